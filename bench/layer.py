"""Forward and backward of one linear layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bench import plots
from bench.bases import OneLayer
from bench.contestants import EIGHT_BIT, Setting
from bench.options import Benchmark, Report, Watch
from bench.results import Point, Record
from bench.tasks import LayerTask
from bench.trial import Trial

CENTRE = {"rank": 16, "tokens": 1024, "width": 2048}
SWEEPS = {
    "rank": (4, 16, 64, 256, 512),
    "tokens": (128, 512, 1024, 2048, 4096),
    "width": (512, 1024, 2048, 4096),
}
NAMED = {"rank": 64, "tokens": 2048, "width": 4096}
"""A point of its own, the size of a 7B model's projections."""
STARTING = {"rank": 16, "tokens": 16, "width": 64}
"""A layer so small that only starting its operations takes time, as on a GPU that is faster than Python."""


@dataclass
class Layer(Benchmark):
    """One square linear layer, forward and backward: sweeps of rank, tokens and width around 16, 1024, 2048."""

    what: ClassVar[str] = "layer"
    title: ClassVar[str] = "Forward and backward of one linear layer"
    note: ClassVar[str] = (
        "Time relative to the frozen layer (forward and input gradient), median of paired ratios with its 95 % "
        "interval. Adapters have moved (B is not 0, m is not n) and change between rounds; outputs and all gradients "
        "are compared with a plain reference before and after."
    )
    draw: ClassVar[Callable[[Record, Path], None]] = staticmethod(plots.lines)

    def points(self) -> list[Point]:
        if self.quick:
            shapes = [{"rank": rank, "tokens": 64, "width": 128} for rank in (4, 8)]
            return [Point(_title(shape), shape, ("rank",)) for shape in shapes]
        sweeps = {key: list(values) for key, values in SWEEPS.items()}
        if self.full:
            sweeps["rank"] += [8, 32, 128]
            sweeps["width"] += [8192]
        if self.torch_device().type == "cuda":
            sweeps["tokens"] += [8192, 16384]
            sweeps["width"] += [] if self.full else [8192]
        groups: dict[tuple[int, ...], tuple[str, ...]] = {tuple(CENTRE.values()): tuple(sweeps)}
        for name, values in sweeps.items():
            for value in sorted(values):
                groups.setdefault(tuple({**CENTRE, name: value}.values()), (name,))
        groups[tuple(NAMED.values())] = ("large",)
        groups[tuple(STARTING.values())] = ("starting",)
        shapes = {values: dict(zip(CENTRE, values, strict=True)) for values in groups}
        return [Point(_title(shapes[values]), shapes[values], shown) for values, shown in groups.items()]

    def measure(self, point: Point, watch: Watch) -> Report:
        width, dtype, device = point.shape["width"], self.torch_dtype(), self.torch_device()
        task = LayerTask(width, width, point.shape["tokens"], dtype, device)
        base = OneLayer(width, width, dtype, device)
        names = self.contestants("PEFT DoRA float32, dropout", "PEFT DoRA bf16, dropout", EIGHT_BIT)
        trial = Trial(base, Setting(("proj",), point.shape["rank"]), names, task)
        trial.race(trial.step, **self.race_options(watch))
        return trial.report(), {}


def _title(shape: dict[str, int]) -> str:
    return f"r {shape['rank']}, {shape['tokens']:,} tokens, {shape['width']:,} wide"
