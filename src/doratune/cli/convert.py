"""``doratune convert``: a DoRA adapter becomes a plain LoRA adapter, for programs that serve no others."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from doratune.checkpoint import inexpressible, load_adapter, save_adapter
from doratune.cli.common import check, say
from doratune.cli.new_folder import new_folder, problem_of_new
from doratune.cli.probe import logits, random_inputs
from doratune.convert import Conversion, LayerFit, convert_to_lora
from doratune.errors import AdapterError
from doratune.files import WEIGHTS
from doratune.hub import adapter_folder
from doratune.model import disabled, set_adapter


@dataclass
class Convert:
    """Write the plain LoRA adapter that comes nearest to a DoRA adapter, and say how near that is."""

    adapter: tyro.conf.Positional[Path]
    """Folder of the adapter, as written by doratune or PEFT, or its name on the hub."""
    output: Path
    """Folder for the LoRA adapter; it must not exist, or be empty. It appears when it is whole, or not at all."""
    rank: int | None = None
    """Of the LoRA adapter; none: the highest of the adapter's own, or 16 for magnitudes alone. Higher keeps more."""
    base: str | None = None
    """Base model, a folder or hub name; none: the one that the adapter names."""
    json: bool = False
    """Print the result as JSON."""


def run(options: Convert) -> int:
    """Load, fit, compare, write."""
    from rich.console import Console
    from rich.text import Text

    from doratune.inference.sources import base_of, loading_base
    from doratune.train.models import load_base
    from doratune.train.quiet import quiet_libraries

    adapter = adapter_folder(options.adapter)
    base = base_of(adapter, options.base)
    check(_problems(options))
    quiet_libraries()
    status = Console(stderr=True, emoji=False).status
    with status(Text(f"Loading {base}")):
        with loading_base(base, named=options.base is None):
            model = load_base(adapter, base)
        load_adapter(model, adapter)
    if reasons := inexpressible(model, "default"):
        lines = [f"{path}: {reason}" for reason, path in reasons.items()]
        raise AdapterError.of(f"{adapter} cannot be a LoRA adapter that others read", lines)
    with status("Fitting"):
        found = convert_to_lora(model, options.rank)
    with status("Comparing outputs"):
        whole = _outputs(model)
    with status(Text(f"Writing {options.output}")):
        _write(model, adapter, options.output)
    size = (options.output / WEIGHTS).stat().st_size
    if options.json:
        layers = [{**asdict(layer), "kept": layer.kept} for layer in found.layers]
        about = {"output": str(options.output), "rank": found.rank, "bytes": size, "kept": found.kept}
        print(json.dumps({**about, "logits": whole, "layers": layers}))
    else:
        out = Console(emoji=False)
        out.print(_table(found, whole))
        before = (adapter / WEIGHTS).stat().st_size
        sizes = f"{size / 1e6:.1f} MB, was {before / 1e6:.1f}"
        say(out, f"LoRA adapter of rank {found.rank} ({sizes}) written to {options.output}")
    return 0


def _problems(options: Convert) -> Iterator[str]:
    if problem := problem_of_new(options.output):
        yield problem
    if options.rank is not None and options.rank < 1:
        yield f"rank must be at least 1; found {options.rank}"


def _outputs(model: Any) -> dict[str, float] | None:
    """How far the two adapters' logits lie apart on random inputs, and the share of what the first one did to them."""
    inputs = random_inputs(model)
    if not inputs:
        return None
    converted = logits(model, inputs)
    set_adapter(model, "default")
    adapted = logits(model, inputs)
    with disabled(model):
        moved = float((adapted - logits(model, inputs)).square().sum())
    difference = converted - adapted
    return {
        "kept": 1 - float(difference.square().sum()) / moved if moved else 1.0,
        "difference": float(difference.abs().max()),
        "largest": float(adapted.abs().max()),
    }


def _write(model: Any, adapter: Path, output: Path) -> None:
    """The adapter, and what lies with the old one for ``generate`` and ``predict``."""
    from doratune.cli.merge import PREPROCESSOR
    from doratune.inference.sources import TOKENIZER_CONFIG
    from doratune.train.information import Information
    from doratune.train.models import load_tokenizer

    about = Information.load(adapter)
    tokenizer = load_tokenizer(str(adapter)) if (adapter / TOKENIZER_CONFIG).is_file() else None
    with new_folder(output, "the adapter") as folder:
        save_adapter(model, folder, "lora")
        if about is not None:
            dataclasses.replace(about, method="lora").save(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if (adapter / PREPROCESSOR).is_file():
            shutil.copyfile(adapter / PREPROCESSOR, folder / PREPROCESSOR)


def _table(found: Conversion, whole: dict[str, float] | None) -> Any:
    """Shares kept, by kind of layer and overall."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"kept of what the adapter changes, at rank {found.rank}")
    for name in ("layers", "number", "kept", "in the worst"):
        table.add_column(name, justify="left" if name == "layers" else "right")
    groups: dict[str, list[LayerFit]] = {}
    for layer in found.layers:
        groups.setdefault(layer.path.rpartition(".")[2], []).append(layer)
    for name, group in groups.items():
        kept = Conversion(found.rank, tuple(group)).kept
        table.add_row(escape(name), str(len(group)), f"{kept:.2%}", f"{min(layer.kept for layer in group):.2%}")
    table.add_section()
    table.add_row("all weights", str(len(found.layers)), f"{found.kept:.2%}", "")
    if whole:
        table.add_row("logits of the model", "", f"{whole['kept']:.2%}", "")
        table.caption = (
            f"shares of squares; on random inputs logits differ by {whole['difference']:.2e} at most, they reach "
            f"{whole['largest']:.1f}"
        )
    else:
        table.caption = "shares of squares; the whole model was not compared: it takes neither tokens nor images"
    return table
