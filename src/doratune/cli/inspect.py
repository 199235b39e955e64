"""``doratune inspect``: what an adapter's folder holds, and how far it moves its base model."""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.markup import escape

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from doratune.study.adapter_file import FileReport
    from doratune.study.decompose import Decomposition

CHANGES = ("dM", "relative", "dD")


@dataclass
class Inspect:
    """Show an adapter: ranks, targets, sizes, values that look wrong. Exit code 1 if it cannot be used."""

    adapter: tyro.conf.Positional[Path]
    """Folder of the adapter, as written by doratune or PEFT."""
    base: str | None = None
    """Base model, a folder or hub name: adds how far magnitudes and directions moved, layer by layer."""
    json: bool = False
    """Print everything as JSON."""


def run(options: Inspect) -> int:
    """Read the folder, with a base model load that too, and print."""
    from rich.console import Console

    from doratune.study.adapter_file import inspect_adapter

    report = inspect_adapter(options.adapter)
    moved = _moved(report, options.base) if options.base and not report.broken else {}
    if options.json:
        print(json.dumps(_as_json(report, moved)))
    else:
        _print(Console(), report, moved)
    return 1 if report.broken else 0


def _moved(report: FileReport, base: str) -> dict[str, Decomposition]:
    from doratune.checkpoint import load_adapter
    from doratune.cli.quiet import quiet_libraries
    from doratune.study.decompose import adapter_change
    from doratune.train.models import load_base

    quiet_libraries()
    model = load_base(Path(report.folder), base)
    load_adapter(model, report.folder)
    return adapter_change(model)


def _as_json(report: FileReport, moved: dict[str, Decomposition]) -> dict[str, Any]:
    whole = asdict(report)
    whole["config"] = {key: list(v) if isinstance(v, tuple) else v for key, v in whole["config"].items()}
    for layer in whole["layers"]:
        change = moved.get(layer["path"])
        layer["change"] = asdict(change) if change else None
    return {**whole, "parameters": report.parameters}


def _table(report: FileReport, moved: dict[str, Decomposition]) -> Table:
    """One row a layer, narrow enough for a terminal: what all paths begin with is said once."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    begin = _common_beginning([layer.path for layer in report.layers])
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(f"layer, after {escape(begin)}" if begin else "layer", overflow="fold")
    dora = report.method == "dora"
    for name in ("rank", "|B| max", *(("m",) if dora else ()), *(CHANGES if moved else ())):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in report.layers:
        row = [
            escape(layer.path.removeprefix(begin)),
            str(layer.rank),
            f"{layer.b_largest:.2g}",
        ]
        if dora:
            row.append("missing" if layer.m_smallest is None else f"{layer.m_smallest:.3g}..{layer.m_largest:.3g}")
        if moved:
            change = moved[layer.path]
            row += [f"{change.magnitude:.1e}", f"{change.relative_magnitude:.2%}", f"{change.direction:.1e}"]
        table.add_row(*row)
    if moved:
        table.caption = "dM: mean |m' - m|, and relative to the mean row norm; dD: mean (1 - cos)"
    return table


def _common_beginning(paths: list[str]) -> str:
    """Whole parts that all paths share, with the dot after them; "" for a single path."""
    if len(paths) < 2:
        return ""
    columns = zip(*(path.split(".")[:-1] for path in paths), strict=False)
    return "".join(f"{parts[0]}." for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, columns))


def _print(out: Console, report: FileReport, moved: dict[str, Decomposition]) -> None:
    config = report.config
    plain = functools.partial(out.print, markup=False, highlight=False, soft_wrap=True)  # paths may hold anything
    plain(f"{report.folder}: {report.method}, rank {config.rank}, alpha {config.alpha:g}")
    plain(f"base model: {report.base_model or 'not named'}; task: {report.task or 'not named'}")
    saved = f" and {len(report.saved)} tensors trained whole" if report.saved else ""
    out.print(
        f"{len(report.layers)} adapted layers{saved}, {report.parameters:,} parameters, {report.bytes / 1e6:.1f} MB"
    )
    if report.layers:
        out.print(_table(report, moved))
    for heading, lines in (("broken", report.broken), ("suspicious", report.suspicious)):
        if lines:
            out.print(f"[bold]{heading}[/bold] ({len(lines)}):")
            for line in lines[:20]:
                plain(f"  - {line}")
            if lines[20:]:
                out.print(f"  and {len(lines) - 20} more; --json lists all")
