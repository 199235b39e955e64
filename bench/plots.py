"""Pictures of results: lines over a swept number, or bars."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from bench.contestants import DORA, FROZEN, FULL, LORA

if TYPE_CHECKING:
    from bench.results import Record

LOOKS: dict[str, dict[str, Any]] = {
    FROZEN: {"color": "0.55", "linestyle": ":"},
    LORA: {"color": "#e58a7b"},
    DORA: {"color": "#b2182b", "linewidth": 2.6},
    "PEFT LoRA": {"color": "#92c5de"},
    "PEFT DoRA": {"color": "#2166ac"},
    "LyCORIS": {"color": "#1b7837"},
    FULL: {"color": "0.35"},
}
"""Colours by the beginning of the name; one family of colours for each maker."""


def look(name: str) -> dict[str, Any]:
    """How a contestant is drawn."""
    style = dict(LOOKS[max((key for key in LOOKS if name.startswith(key)), key=len)])
    if "accelerated" in name:
        style["color"] = "#8856a7"
    if "8-bit" in name:
        style["linestyle"] = (0, (1, 1))
    elif "dropout" in name:
        style["linestyle"] = "-."
    elif "float32" in name:
        style["linestyle"] = "--"
    return style


def lines(record: Record, path: Path) -> None:
    """One panel a group: time relative to frozen over the number that the group is named after."""
    groups = {key: points for key, points in record.groups().items() if key in points[0]["shape"] and len(points) > 1}
    if not groups:
        return bars(record, path)
    # Title and legend need the width of three, however few there are.
    figure = Figure(figsize=(3.3 * max(3, len(groups)), 5.0), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, (group, points) in zip(panels, groups.items(), strict=True):
        points = sorted(points, key=lambda point: point["shape"][group])
        for name in dict.fromkeys(entry["name"] for point in points for entry in point["entries"]):
            found = [
                (point["shape"][group], entry["timing"]["ratio"])
                for point in points
                for entry in point["entries"]
                if entry["name"] == name and "timing" in entry
            ]
            if found:
                axes.plot(*zip(*found, strict=True), marker="o", markersize=4, label=name, **look(name))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator([point["shape"][group] for point in points]))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.set_major_locator(FixedLocator([1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16]))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        fixed = {key: value for key, value in points[0]["shape"].items() if key != group}
        axes.set_title(", ".join(f"{key} {value:,}" for key, value in fixed.items()), fontsize=10)
        axes.set_xlabel(group)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("time, x frozen layer")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    figure.suptitle(_title(record), fontsize=11)
    figure.savefig(path)


def bars(record: Record, path: Path) -> None:
    """One panel for each point and number, one bar a contestant."""
    panels = [
        (point, key) for point in record.points for key in _keys(point) if any(_value(e, key) for e in point["entries"])
    ]
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    names = list(dict.fromkeys(e["name"] for point in record.points for e in point["entries"]))
    height = 0.27 * len(names) + 0.8
    figure = Figure(figsize=(2.9 + 2.6 * columns, height * rows + 0.5), dpi=120, layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, (point, key) in zip(grid.flat, panels, strict=False):
        entries = {entry["name"]: entry for entry in point["entries"]}
        values = [_value(entries.get(name, {}), key) or 0.0 for name in names]
        colors = [look(name)["color"] for name in names]
        axes.barh(range(len(names)), values, color=colors, height=0.72)
        _intervals(axes, [entries.get(name, {}) for name in names], key)
        for row, (name, value) in enumerate(zip(names, values, strict=True)):
            entry = entries.get(name, {})
            failed = entry.get("status") in ("wrong", "failed")
            text = short(value) if value else entry["status"] if failed else ""
            axes.text(_end(entry, key, value), row, f" {text}", va="center", fontsize=9)
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.set_xlim(0, 1.25 * max(_end(entries.get(n, {}), key, v) for n, v in zip(names, values, strict=True)))
        axes.set_title(textwrap.fill(point["title"], 30), fontsize=9)
        axes.set_xlabel(key, fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    grid[0][0].invert_yaxis()
    figure.suptitle(_title(record), fontsize=10)
    figure.savefig(path)


def short(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}" if value >= 1 else f"{value:.2g}"


def _end(entry: dict[str, Any], key: str, value: float) -> float:
    """How far a bar and its interval reach."""
    return entry["timing"]["high"] if key == RATIO and "timing" in entry else value


def _intervals(axes: Any, entries: list[dict[str, Any]], key: str) -> None:
    """Confidence intervals of ratios."""
    for row, entry in enumerate(entries):
        if key == RATIO and "timing" in entry:
            axes.plot([entry["timing"]["low"], entry["timing"]["high"]], [row, row], color="0.1", linewidth=1)


RATIO = "time, x frozen"


def _keys(point: dict[str, Any]) -> list[str]:
    timed = any("timing" in entry for entry in point["entries"])
    measured = [key for entry in point["entries"] for key in entry.get("measured", {})]
    return [*([RATIO] if timed else []), *dict.fromkeys(measured)]


def _value(entry: dict[str, Any], key: str) -> float | None:
    if key == RATIO:
        return entry["timing"]["ratio"] if "timing" in entry else None
    return entry.get("measured", {}).get(key)


def _title(record: Record) -> str:
    hardware = record.machine.get("gpu") or f"{record.machine['cores']} CPU cores"
    return f"{record.title} ({hardware}, {record.settings['dtype']}, {record.date})"
