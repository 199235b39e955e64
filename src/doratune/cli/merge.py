"""``doratune merge``: an adapter and its base model become one plain model."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import Tensor

from doratune.checkpoint import load_adapter
from doratune.cli.common import check, say
from doratune.cli.new_folder import new_folder, problem_of_new
from doratune.cli.probe import logits, random_inputs
from doratune.errors import AdapterError
from doratune.hub import adapter_folder
from doratune.inference.loading import MERGED
from doratune.inference.sources import base_of, loading_base, tokenizer_source
from doratune.merge import MergeCheck, merge, verify_merge
from doratune.model_files import save_model
from doratune.train.choices import Dtype
from doratune.train.information import Information
from doratune.train.models import PREPROCESSOR, align_padding, has_tokenizer, load_base, load_tokenizer
from doratune.train.quiet import quiet_libraries


@dataclass
class Merge:
    """Put an adapter into the weights of its base model, and write the whole model to a folder."""

    adapter: tyro.conf.Positional[Path]
    """Folder of the adapter, as written by doratune or PEFT, or its name on the hub."""
    output: Path
    """Folder for the merged model; it must not exist, or be empty. It appears when it is whole, or not at all."""
    base: str | None = None
    """Base model, a folder or hub name; none: the one that the adapter names."""
    dtype: Dtype = "auto"
    """Of the merged weights; auto: as the base is stored."""
    verify: bool = False
    """Compare merged with unmerged outputs. Layer by layer a difference beyond rounding is an error; that of the whole
    model, where rounding grows from layer to layer, is shown and not judged."""
    json: bool = False
    """Print the result as JSON."""


def run(options: Merge) -> int:
    """Load, check, merge, check again, write."""
    adapter = adapter_folder(options.adapter)
    base = base_of(adapter, options.base)
    check(filter(None, [problem_of_new(options.output)]))
    quiet_libraries()
    screen = Console(stderr=True, emoji=False)
    status = screen.status
    about = Information.load(adapter)
    if about and about.quantize:
        say(screen, MERGED.format(about.quantize))
    with status(Text(f"Loading {base}")):
        with loading_base(base, named=options.base is None):
            model = load_base(adapter, base, options.dtype)
            tokenizer = _tokenizer(model, adapter, base)
        if tokenizer is not None:
            align_padding(model, tokenizer)
        load_adapter(model, adapter)
    with status("Comparing layers"):
        checks = verify_merge(model) if options.verify else []
    bad = [f"{c.path}: {c.difference:.2e}, rounding explains {c.tolerance:.2e}" for c in checks if not c.holds]
    if bad:
        raise AdapterError.of("merged and unmerged outputs differ", bad)
    with status("Merging"):
        inputs = random_inputs(model.eval()) if options.verify else {}
        before = logits(model, inputs) if inputs else None
        merge(model)
        whole = None if before is None else _difference(before, logits(model, inputs))
    with status(Text(f"Writing {options.output}")):
        _write(model, tokenizer, adapter, base, options.output)
    if options.json:
        worst = max((c.difference for c in checks), default=None)
        found = {"output": str(options.output), "layers": len(checks), "largest_difference": worst, "logits": whole}
        print(json.dumps({**found, "checks": [asdict(c) for c in checks]}))
    else:
        out = Console(emoji=False)
        if checks:
            out.print(_table(checks, whole))
        say(out, f"Merged model written to {options.output}")
    return 0


def _difference(before: Tensor, after: Tensor) -> dict[str, float]:
    """Largest difference between the whole model's outputs, and the largest value for comparison."""
    return {"difference": float((after - before).abs().max()), "largest": float(before.abs().max())}


def _tokenizer(model: Any, adapter: Path, base: str) -> Any:
    """The adapter's own or the base's; None for models of images, and for folders without one."""
    source = tokenizer_source([adapter], base)
    folder = Path(source).expanduser()
    if getattr(model, "main_input_name", None) == "pixel_values" or (folder.is_dir() and not has_tokenizer(folder)):
        return None
    return load_tokenizer(source)


def _image_settings(model: Any, adapter: Path, base: str) -> Path | None:
    """How images become the model's input: the adapter's file or the base's; None where neither has one."""
    from transformers.utils import cached_file

    own = adapter / PREPROCESSOR
    if own.is_file():
        return own
    if getattr(model, "main_input_name", None) != "pixel_values":
        return None
    try:
        return Path(cached_file(os.path.expanduser(base), PREPROCESSOR))
    except OSError:  # there is none
        return None


def _write(model: Any, tokenizer: Any, adapter: Path, base: str, output: Path) -> None:
    """All files, in one new folder."""
    images = _image_settings(model, adapter, base)
    about = Information.load(adapter)
    with new_folder(output, "the merged model") as folder:
        save_model(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if about is not None:  # which predict needs besides the weights; they are no longer loaded as in training
            dataclasses.replace(about, dtype="auto", quantize=None, double_quant=True).save(folder)
        if images is not None:
            shutil.copyfile(images, folder / PREPROCESSOR)


def _table(checks: list[MergeCheck], whole: dict[str, float] | None) -> Table:
    """Differences by kind of layer: the worst of each, and of the whole model."""
    table = Table(title="merged against unmerged, relative to the largest output")
    for name in ("layers", "number", "largest difference", "rounding explains"):
        table.add_column(name, justify="left" if name == "layers" else "right")
    groups: dict[str, list[MergeCheck]] = {}
    for one in checks:
        groups.setdefault(one.path.rpartition(".")[2], []).append(one)
    for name, group in groups.items():
        worst = max(c.difference for c in group)
        table.add_row(escape(name), str(len(group)), f"{worst:.1e}", f"{max(c.tolerance for c in group):.1e}")
    if whole:
        table.add_section()
        relative = whole["difference"] / (whole["largest"] or 1.0)  # a head of zeros has logits of zero
        table.add_row("logits of the model", "", f"{relative:.1e}", "")
        table.caption = f"logits differ by {whole['difference']:.2e} at most, they reach {whole['largest']:.1f}"
    else:
        table.caption = "the whole model was not compared: it takes neither tokens nor images"
    return table
