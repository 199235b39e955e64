"""``doratune convert``: an adapter becomes a plain LoRA adapter, or itself in the format of PEFT or mlx-lm."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from doratune.checkpoint import inexpressible, load_adapter, save_adapter
from doratune.cli.common import check, say
from doratune.cli.new_folder import new_folder, problem_of_new
from doratune.cli.probe import logits, random_inputs
from doratune.convert import Conversion, LayerFit, convert_to_lora
from doratune.errors import AdapterError
from doratune.files import CONFIG, MLX_WEIGHTS, WEIGHTS, is_mlx, read_any_config
from doratune.hub import adapter_folder
from doratune.inference.loading import Loading
from doratune.inference.sources import TOKENIZER_CONFIG, base_of, loading_base
from doratune.interop import mlx
from doratune.interop.mlx.files import AdapterFiles
from doratune.model import disabled, set_adapter
from doratune.targets import adapted_layers
from doratune.train import models
from doratune.train.information import Information
from doratune.train.model_names import NAMELESS, found_beside
from doratune.train.quiet import quiet_libraries

METHODS = {"dora": "DoRA", "lora": "LoRA"}
FORMATS = {"peft": "PEFT", "mlx": "mlx-lm"}


@dataclass
class Convert:
    """Write the plain LoRA adapter that comes nearest to a DoRA adapter, or the same adapter in another format."""

    adapter: tyro.conf.Positional[Path]
    """Folder of the adapter, as written by doratune, PEFT or Apple's mlx-lm, or its name on the hub."""
    output: Path
    """Folder for the new adapter; it must not exist, or be empty. It appears when it is whole, or not at all."""
    to: Literal["lora", "peft", "mlx"] = "lora"
    """lora: the nearest plain LoRA adapter, in PEFT's format; peft, mlx: the same function in PEFT's or mlx-lm's."""
    rank: int | None = None
    """With lora: its rank; none: the highest of the adapter's own, or 16 for magnitudes alone. Higher keeps more."""
    base: str | None = None
    """Base model, a folder or hub name; none: the one that the adapter names."""
    json: bool = False
    """Print the result as JSON."""


def run(options: Convert) -> int:
    """Load, translate or fit and compare, write."""
    options = dataclasses.replace(options, adapter=adapter_folder(options.adapter))
    theirs = (options.adapter / CONFIG).is_file() and is_mlx(read_any_config(options.adapter))
    base = _base_of_mlx(options) if theirs else base_of(options.adapter, options.base)
    check(_problems(options))
    quiet_libraries()
    status = Console(stderr=True, emoji=False).status
    with status(Text(f"Loading {base}")):
        model = _load(options, base, theirs)
    if options.to != "mlx" and (reasons := inexpressible(model, "default")):
        what = "a LoRA adapter" if options.to == "lora" else "an adapter of PEFT's format"
        lines = [f"{path}: {reason}" for reason, path in reasons.items()]
        raise AdapterError.of(f"{options.adapter} cannot be {what} that others read", lines)
    before = (options.adapter / (MLX_WEIGHTS if theirs else WEIGHTS)).stat().st_size
    return (_fit if options.to == "lora" else _translate)(options, model, before)


def _fit(options: Convert, model: Any, before: int) -> int:
    """Make and write the nearest LoRA adapter, and print how near it is."""
    status = Console(stderr=True, emoji=False).status
    with status("Fitting"):
        found = convert_to_lora(model, options.rank)
    with status("Comparing outputs"):
        whole = _outputs(model)
    with status(Text(f"Writing {options.output}")):
        _write(model, options.adapter, options.output, "lora", method="lora")
    size = (options.output / WEIGHTS).stat().st_size
    if options.json:
        layers = [{**asdict(layer), "kept": layer.kept} for layer in found.layers]
        about = {"output": str(options.output), "rank": found.rank, "bytes": size, "kept": found.kept}
        print(json.dumps({**about, "logits": whole, "layers": layers}))
    else:
        out = Console(emoji=False)
        out.print(_table(found, whole))
        say(out, f"LoRA adapter of rank {found.rank} ({_sizes(size, before)}) written to {options.output}")
    return 0


def _translate(options: Convert, model: Any, before: int) -> int:
    """Write the same adapter in another format, and print what it is."""
    layers = adapted_layers(model).values()
    method = next(iter(layers)).adapters["default"].config.method
    rank = max(layer.adapters["default"].rank for layer in layers)
    if options.to == "mlx":
        with new_folder(options.output, "the adapter") as folder:
            mlx.save_adapter(model, folder)
    else:
        _write(model, options.adapter, options.output, "default")
    size = (options.output / (MLX_WEIGHTS if options.to == "mlx" else WEIGHTS)).stat().st_size
    if options.json:
        about = {"output": str(options.output), "to": options.to, "method": method, "rank": rank, "bytes": size}
        print(json.dumps({**about, "layers": len(layers)}))
    else:
        what = f"{METHODS[method]} adapter of rank {rank} on {len(layers)} layers ({_sizes(size, before)})"
        say(Console(), f"{what} written to {options.output}, in {FORMATS[options.to]}'s format")
    return 0


def _sizes(size: int, before: int) -> str:
    return f"{size / 1e6:.1f} MB, was {before / 1e6:.1f}"


def _base_of_mlx(options: Convert) -> str:
    """The base model, as ``base_of`` finds it for PEFT's folders."""
    named = AdapterFiles.read(options.adapter).base  # a broken adapter is found before a large model is loaded
    if not (options.base or named):
        raise AdapterError(NAMELESS.format(options.adapter))
    return options.base or found_beside(options.adapter, str(named))


def _load(options: Convert, base: str, theirs: bool) -> Any:
    """The base model, as in training, with the adapter on it."""
    about = None if theirs else Information.load(options.adapter)
    with loading_base(base, named=options.base is None):
        if about is not None and about.quantize:
            # Magnitudes trained on a quantised base change any other one everywhere, by what quantising took from it.
            loading = Loading.choose({options.adapter.name: about})
            say(Console(stderr=True, emoji=False), f"the base is loaded as in training: --quantize {about.quantize}")
            dtype, more = loading.options(about.task in models.CLASSIFIERS)
            model = models.load_base(options.adapter, base, dtype, more)
        else:
            model = models.load_model(base) if theirs else models.load_base(options.adapter, base)
    return (mlx.load_adapter if theirs else load_adapter)(model, options.adapter)


def _problems(options: Convert) -> Iterator[str]:
    if problem := problem_of_new(options.output):
        yield problem
    if options.rank is not None and options.to != "lora":
        yield f"rank can be chosen with --to lora only: --to {options.to} writes the same adapter; found {options.rank}"
    elif options.rank is not None and options.rank < 1:
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


def _write(model: Any, adapter: Path, output: Path, name: str, method: str | None = None) -> None:
    """The adapter of that name, and what lies with the old one for ``generate`` and ``predict``."""
    about = Information.load(adapter)
    tokenizer = models.load_tokenizer(str(adapter)) if (adapter / TOKENIZER_CONFIG).is_file() else None
    with new_folder(output, "the adapter") as folder:
        save_adapter(model, folder, name)
        if about is not None:
            dataclasses.replace(about, method=method or about.method).save(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if (adapter / models.PREPROCESSOR).is_file():
            shutil.copyfile(adapter / models.PREPROCESSOR, folder / models.PREPROCESSOR)


def _table(found: Conversion, whole: dict[str, float] | None) -> Table:
    """Shares kept, by kind of layer and overall."""
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
