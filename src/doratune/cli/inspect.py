"""``doratune inspect``: what an adapter's folder holds, and how far it moves its base model."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:
    from rich.console import Console

    from doratune.study.adapter_file import FileReport
    from doratune.study.decompose import Decomposition


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
    from doratune.train.models import load_model

    quiet_libraries()
    model = load_model(base, "auto", report.task)
    load_adapter(model, report.folder)
    return adapter_change(model)


def _as_json(report: FileReport, moved: dict[str, Decomposition]) -> dict[str, Any]:
    whole = asdict(report)
    whole["config"] = {key: list(v) if isinstance(v, tuple) else v for key, v in whole["config"].items()}
    for layer in whole["layers"]:
        change = moved.get(layer["path"])
        layer["change"] = asdict(change) if change else None
    return {**whole, "parameters": report.parameters}


def _print(out: Console, report: FileReport, moved: dict[str, Decomposition]) -> None:
    from rich.table import Table

    config = report.config
    plain = functools.partial(out.print, markup=False, highlight=False, soft_wrap=True)  # paths may hold anything
    plain(f"{report.folder}: {report.method}, rank {config.rank}, alpha {config.alpha:g}")
    plain(f"base model: {report.base_model or 'not named'}; task: {report.task or 'not named'}")
    saved = f" and {len(report.saved)} tensors trained whole" if report.saved else ""
    out.print(
        f"{len(report.layers)} adapted layers{saved}, {report.parameters:,} parameters, {report.bytes / 1e6:.1f} MB"
    )
    if report.layers:
        table = Table()
        table.add_column("layer", overflow="fold")
        for name in ("rank", "parameters", "|A| max", "|B| max", *(("m",) if report.method == "dora" else ())):
            table.add_column(name, justify="right")
        for name in ("delta M", "relative", "delta D") if moved else ():
            table.add_column(name, justify="right")
        for layer in report.layers:
            row = [layer.path, str(layer.rank), f"{layer.parameters:,}", f"{layer.a_largest:.3g}"]
            row.append(f"{layer.b_largest:.3g}")
            if report.method == "dora":
                row.append(
                    "missing" if layer.m_smallest is None else f"{layer.m_smallest:.3g} to {layer.m_largest:.3g}"
                )
            if moved:
                change = moved[layer.path]
                row += [f"{change.magnitude:.2e}", f"{change.relative_magnitude:.2%}", f"{change.direction:.2e}"]
            table.add_row(*row)
        if moved:
            table.caption = "delta M: mean |m' - m|; relative: to the mean row norm; delta D: mean (1 - cos)"
        out.print(table)
    for heading, lines in (("broken", report.broken), ("suspicious", report.suspicious)):
        if lines:
            out.print(f"[bold]{heading}[/bold] ({len(lines)}):")
            for line in lines[:20]:
                plain(f"  - {line}")
            if lines[20:]:
                out.print(f"  and {len(lines) - 20} more; --json lists all")
