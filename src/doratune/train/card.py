"""README.md beside what was trained: what it is, what it reached, how to use it. The model hub shows it as its page."""

from __future__ import annotations

from pathlib import Path

from doratune.config import AdapterConfig
from doratune.extras import require
from doratune.files import write_whole
from doratune.train.config import TrainConfig
from doratune.train.models import LOADERS
from doratune.train.results import TrainResult
from doratune.train.sources import is_hub_name

FILE = "README.md"
HERE = "FOLDER"
"""Stands for the adapter: nobody knows yet what it will be called."""
NAMES = {
    "dora": "DoRA adapter",
    "lora": "LoRA adapter",
    "magnitude": "Magnitudes",
    "full": "Fine-tuned model",
    "head": "Fine-tuned head",
}


def write_card(folder: Path, config: TrainConfig, result: TrainResult) -> None:
    """Write a model card; folders of this machine are not named in it."""
    write_whole(folder / FILE, f"---\n{_metadata(config, result)}\n---\n\n{_text(config, result)}")


def _metadata(config: TrainConfig, result: TrainResult) -> str:
    library = "peft" if result.peft else "doratune"
    data = require("huggingface_hub").ModelCardData(
        base_model=config.model if is_hub_name(config.model) else None,
        library_name=library if config.is_adapter else "transformers",
        pipeline_tag=config.task,
        tags=["doratune", *([config.method] if config.is_adapter else [])],
        datasets=[name for name in config.data if is_hub_name(name)] or None,
    )
    return str(data.to_yaml())


def _text(config: TrainConfig, result: TrainResult) -> str:
    from doratune import __version__

    precision = result.dtype + (f", base quantised ({config.quantize})" if config.quantize else "")
    counted = "token" if result.unit == "tokens" else "example"
    rows = "\n".join(f"| {name} | {value} |" for name, value in result.rows())
    return f"""# {NAMES[config.method]} of {Path(config.model).name}

{_about(config)} Trained with doratune {__version__} for {config.task}: {result.steps:,} steps, \
{precision}, seed {result.seed}. One run; losses are in nats per {counted}.

| | |
|---|---|
{rows}

## Use

{HERE} is this folder, or its name on the model hub.

```sh
{result.command_to_use(HERE)}
```

```python
{_python(config, result)}
```
"""


def _about(config: TrainConfig) -> str:
    adapter: AdapterConfig | None = config.adapter_config()
    if adapter is None:
        return "A whole model."
    sizes = "" if config.method == "magnitude" else f"Rank {adapter.rank}, alpha {adapter.alpha:g}. "
    targets = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
    told = f"{sizes}Targets: {targets}."
    if config.start_from is None:
        return told
    return f"{told} Begun from {config.start_from if is_hub_name(config.start_from) else 'another adapter'}."


def _python(config: TrainConfig, result: TrainResult) -> str:
    loader = result.loader or LOADERS[config.task]
    imported = f"from transformers import {loader}"
    if not config.is_adapter:
        return f'{imported}\n\nmodel = {loader}.from_pretrained("{HERE}")'
    base = config.model if is_hub_name(config.model) else f"path/to/{Path(config.model).name}"
    size = f", num_labels={len(result.labels)}, ignore_mismatched_sizes=True" if result.labels else ""
    loading = f'base = {loader}.from_pretrained("{base}"{size})\nmodel = '
    if not result.peft:
        return f'import doratune\n{imported}\n\n{loading}doratune.load_adapter(base, "{HERE}")'
    about = f'from peft import PeftModel  # or doratune.load_adapter(base, "{HERE}")\n{imported}'
    return f'{about}\n\n{loading}PeftModel.from_pretrained(base, "{HERE}")'
