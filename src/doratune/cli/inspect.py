"""``doratune inspect``: what an adapter's folder holds, and how far it moves its base model."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from doratune.cli.common import say
from doratune.files import reading_adapter
from doratune.hub import adapter_folder, base_folder
from doratune.study.adapter_file import FileReport, inspect_adapter
from doratune.study.analysis import analyze
from doratune.study.decompose import Decomposition
from doratune.study.page import without_nan

CHANGES = ("dM/|w|", "dD", "eff.", "new")


@dataclass
class Inspect:
    """Show an adapter: ranks, targets, sizes, values that look wrong. Exit code 1 if it cannot be used."""

    adapter: tyro.conf.Positional[Path]
    """Folder of the adapter, as written by doratune or PEFT, or its name on the hub."""
    base: str | None = None
    """Base model, a folder or hub name: adds what the adapter does to each layer, as `doratune analyze` has it."""
    json: bool = False
    """Print everything as JSON."""


def run(options: Inspect) -> int:
    """Read the folder, with a base model load that too, and print."""
    adapter = adapter_folder(options.adapter)
    with reading_adapter(adapter):
        report = inspect_adapter(adapter)
    moved: dict[str, Decomposition] = {}
    unfit: dict[str, str] = {}
    if options.base and not report.broken:
        moved, unfit = _moved(adapter, options.base)
    if options.json:
        print(json.dumps(without_nan({**_as_json(report, moved), "not_compared": unfit})))
    else:
        _print(Console(emoji=False), report, moved, [f"{path}: {reason}" for path, reason in unfit.items()])
    return 1 if report.broken else 0


def _moved(adapter: Path, base: str) -> tuple[dict[str, Decomposition], dict[str, str]]:
    """By the adapter's own paths what it does to the base, and what could not be compared, with the reason."""
    run = analyze(base_folder(base), {"adapter": adapter}).runs[0]
    moved = {point.own_path: point.change for point in run.points}
    return moved, {path: reason for path, reason in run.left_out.items() if reason in run.troubling}


def _as_json(report: FileReport, moved: dict[str, Decomposition]) -> dict[str, Any]:
    whole = asdict(report)
    for layer in whole["layers"]:
        change = moved.get(layer["path"])
        layer["change"] = asdict(change) if change else None
    return {**whole, "parameters": report.parameters}


def _table(report: FileReport, moved: dict[str, Decomposition]) -> Table:
    """One row a layer, narrow enough for a terminal: what all paths begin with is said once."""
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
            row += _cells(moved.get(layer.path))
        table.add_row(*row)
    if moved:
        table.caption = (
            "dM/|w|: mean |m' - m| per mean row norm; dD: mean (1 - cos); "
            "eff.: effective rank of the change; new: intruder dimensions"
        )
    return table


def _cells(change: Decomposition | None) -> list[str]:
    if change is None:
        return ["-"] * len(CHANGES)
    spectrum = change.spectrum
    ranks = [f"{spectrum.effective_rank:.1f}", str(spectrum.intruders)] if spectrum else ["-", "-"]
    return [f"{change.relative_magnitude:.2%}", f"{change.direction:.1e}", *ranks]


def _common_beginning(paths: list[str]) -> str:
    """Whole parts that all paths share, with the dot after them; "" for a single path."""
    if len(paths) < 2:
        return ""
    columns = zip(*(path.split(".")[:-1] for path in paths), strict=False)
    return "".join(f"{parts[0]}." for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, columns))


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} KB"


def _print(out: Console, report: FileReport, moved: dict[str, Decomposition], unfit: list[str]) -> None:
    config = report.config
    say(out, f"{report.folder}: {report.method}, rank {config.rank}, alpha {config.alpha:g}")
    say(out, f"base model: {report.base_model or 'not named'}; task: {report.task or 'not named'}")
    saved = f" and {len(report.saved)} tensors trained whole" if report.saved else ""
    out.print(f"{len(report.layers)} adapted layers{saved}, {report.parameters:,} parameters, {_size(report.bytes)}")
    if report.layers:
        out.print(_table(report, moved))
    found = (("broken", report.broken), ("suspicious", report.suspicious), ("not compared with the base", unfit))
    for heading, lines in found:
        if lines:
            out.print(f"[bold]{heading}[/bold] ({len(lines)}):")
            for line in lines[:20]:
                say(out, f"  - {line}")
            if lines[20:]:
                out.print(f"  and {len(lines) - 20} more; --json lists all")
