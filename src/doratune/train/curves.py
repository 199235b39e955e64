"""Loss curves of one or several runs as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from doratune.extras import require

SMOOTHING = 0.8
"""Share of the running mean in the thick line; single steps are the thin one."""
PICTURES = {
    "loss": "training loss (thick: smoothed)",
    "eval_loss": "held-out loss",
    "eval_accuracy": "held-out accuracy",
}
"""What is drawn, each in a picture of its own."""


def draw_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, title: str, loss_unit: str = "nats per token"
) -> None:
    """Draw training loss, held-out loss and held-out accuracy over the steps, those of them that there are.

    Args:
        runs: for each label the records of a metrics.jsonl: ``step`` with ``loss``, ``eval_loss`` or ``eval_accuracy``.
        path: PNG to write.
        title: above the picture.
        loss_unit: beside the losses.

    Raises:
        AdapterError: if matplotlib is not installed.
    """
    Figure = require("matplotlib.figure", "study").Figure
    # A short run has no training loss: it is told every log_every steps.
    drawn = [key for key in PICTURES if any(key in record for records in runs.values() for record in records)]
    drawn = drawn or ["loss"]
    figure = Figure(figsize=(4.5 * max(2, len(drawn)), 4), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(drawn), squeeze=False)[0]
    for index, (label, records) in enumerate(runs.items()):
        # Runs that do the same lie on each other: the first line is the widest, so that each shows beside the next.
        width = max(1.2, 5 - 1.7 * index) if len(runs) > 1 else 2
        look: dict[str, Any] = {"color": f"C{index}", "linewidth": width, "label": label}
        for axis, key in zip(axes, drawn, strict=True):
            steps, values = _points(records, key)
            if key == "loss":
                axis.plot(steps, values, color=look["color"], alpha=0.2, linewidth=0.8)
                axis.plot(steps, _smooth(values), **look)
            else:
                axis.plot(steps, values, marker="o", markersize=look["linewidth"] + 4, **look)
    for axis, key in zip(axes, drawn, strict=True):
        axis.set_xlabel("step")
        axis.set_ylabel("share of right answers" if "accuracy" in key else loss_unit)
        axis.set_title(PICTURES[key], fontsize=10)
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
    smoothed: list[float] = require("pandas").Series(values, dtype=float).ewm(alpha=1 - SMOOTHING).mean().tolist()
    return smoothed
