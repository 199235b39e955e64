"""Loss curves of one or several runs as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from doratune.train.extras import require

SMOOTHING = 0.8
"""Share of the running mean in the thick line; single steps are the thin one."""


def draw_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, title: str = "") -> None:
    """Draw training and held-out loss over the steps.

    Args:
        runs: for each label the records of a metrics.jsonl: ``step`` with ``loss`` or ``eval_loss``.
        path: PNG to write.
        title: above the picture.

    Raises:
        AdapterError: if matplotlib is not installed.
    """
    Figure = require("matplotlib.figure", "study").Figure
    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    measured = any("eval_loss" in record for records in runs.values() for record in records)
    axes = figure.subplots(1, 2 if measured else 1, squeeze=False)[0]
    for index, (label, records) in enumerate(runs.items()):
        # Runs that do the same lie on each other: the first line is the widest, so that each shows beside the next.
        look: dict[str, Any] = {"color": f"C{index}", "linewidth": max(1.2, 5 - 1.7 * index), "label": label}
        steps, losses = _points(records, "loss")
        axes[0].plot(steps, losses, color=look["color"], alpha=0.2, linewidth=0.8)
        axes[0].plot(steps, _smooth(losses), **look)
        if measured:
            axes[1].plot(*_points(records, "eval_loss"), marker="o", markersize=look["linewidth"] + 4, **look)
    for axis, name in zip(axes, ("training loss (thick: smoothed)", "held-out loss"), strict=False):
        axis.set_xlabel("step")
        axis.set_ylabel("nats per token")
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=11)
    figure.savefig(path)


def _points(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = [(record["step"], record[key]) for record in records if key in record]
    return [step for step, _ in found], [value for _, value in found]


def _smooth(values: Sequence[float]) -> list[float]:
    """Running mean, without the pull to 0 at the start."""
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        out.append(mean / weight)
    return out
