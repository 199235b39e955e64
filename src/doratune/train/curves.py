"""Loss curves of one or several runs as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from doratune.extras import require

SMOOTHING = 0.8
"""Share of the running mean in the thick line; single steps are the thin one."""
MEASURED = {"eval_loss": "held-out loss", "eval_accuracy": "held-out accuracy"}
"""What is measured besides the training loss, each in a picture of its own."""


def draw_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, title: str, loss_unit: str = "nats per token"
) -> None:
    """Draw training and held-out loss over the steps, and held-out accuracy where it was measured.

    Args:
        runs: for each label the records of a metrics.jsonl: ``step`` with ``loss``, ``eval_loss`` or ``eval_accuracy``.
        path: PNG to write.
        title: above the picture.
        loss_unit: beside the losses.

    Raises:
        AdapterError: if matplotlib is not installed.
    """
    Figure = require("matplotlib.figure", "study").Figure
    measured = [key for key in MEASURED if any(key in record for records in runs.values() for record in records)]
    figure = Figure(figsize=(4.5 * max(2, 1 + len(measured)), 4), dpi=120, layout="constrained")
    axes = figure.subplots(1, 1 + len(measured), squeeze=False)[0]
    for index, (label, records) in enumerate(runs.items()):
        # Runs that do the same lie on each other: the first line is the widest, so that each shows beside the next.
        width = max(1.2, 5 - 1.7 * index) if len(runs) > 1 else 2
        look: dict[str, Any] = {"color": f"C{index}", "linewidth": width, "label": label}
        steps, losses = _points(records, "loss")
        axes[0].plot(steps, losses, color=look["color"], alpha=0.2, linewidth=0.8)
        axes[0].plot(steps, _smooth(losses), **look)
        for axis, key in zip(axes[1:], measured, strict=True):
            axis.plot(*_points(records, key), marker="o", markersize=look["linewidth"] + 4, **look)
    names = ["training loss (thick: smoothed)", *(MEASURED[key] for key in measured)]
    for axis, name in zip(axes, names, strict=True):
        axis.set_xlabel("step")
        axis.set_ylabel("share of right answers" if "accuracy" in name else loss_unit)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
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
