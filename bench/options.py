"""What all benchmarks can be told, and the loop over their points."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import plots
from bench.contestants import BUILDERS, FROZEN
from bench.results import HERE, Point, Record, reason
from doratune.ops.hardware import multiplies

Watch = Callable[[int, float], Any]
Report = tuple[list[dict[str, Any]], dict[str, Any]]


@dataclass
class Options:
    """Options of every benchmark."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the base weights and the inputs; auto: bfloat16 where the processor computes with it, else float32."""
    threads: int | None = None
    """Of torch on the CPU; none: torch's choice."""
    seconds: float = 10.0
    """Length of each race; slow contestants make it longer, there are always six rounds."""
    rounds: int = 100
    """A race has no more rounds than these."""
    quick: bool = False
    """Tiny shapes for a second each: does it work at all?"""
    full: bool = False
    """All shapes, also those that take long."""
    only: tuple[str, ...] = ()
    """Contestants whose names contain one of these texts (and frozen); none: all."""
    without: tuple[str, ...] = ()
    """Contestants whose names contain one of these texts are left out."""
    select: tuple[str, ...] = ()
    """Points whose titles contain one of these texts; none: all. They join earlier ones of that day and source."""
    output: Path = HERE / "results"
    """Folder for JSON, Markdown and PNG."""

    def torch_device(self) -> torch.device:
        wanted = self.device
        if wanted == "auto":
            wanted = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(wanted)

    def torch_dtype(self) -> torch.dtype:
        if self.dtype == "auto":
            return torch.bfloat16 if multiplies(torch.bfloat16, self.torch_device()) else torch.float32
        return getattr(torch, self.dtype)

    def race_options(self, watch: Watch) -> dict[str, Any]:
        """For ``doratune.study.race.race``."""
        seconds = min(self.seconds, 1.0) if self.quick else self.seconds
        return {"seconds": seconds, "rounds": self.rounds, "device": self.torch_device(), "watch": watch}

    def contestants(self, *unwanted: str) -> list[str]:
        """Names of who takes part, without those that contain an unwanted text."""
        unwanted = (*unwanted, *self.without)
        names = [name for name in BUILDERS if name == FROZEN or not any(text in name for text in unwanted)]
        if self.torch_dtype() == torch.float32:  # PEFT's adapters are float32 then in any case
            names = [name for name in names if "bf16" not in name]
        return [name for name in names if name == FROZEN or not self.only or any(text in name for text in self.only)]


@dataclass
class Benchmark(Options, ABC):
    """One benchmark: its points, and what is done at each."""

    what: ClassVar[str]
    title: ClassVar[str]
    note: ClassVar[str]
    draw: ClassVar[Callable[[Record, Path], None]] = staticmethod(plots.bars)

    @abstractmethod
    def points(self) -> Sequence[Point]:
        """The settings to measure."""

    def chosen_points(self) -> list[Point]:
        """The points that ``select`` asks for."""
        texts = self.select
        return [point for point in self.points() if not texts or any(text in point.title for text in texts)]

    @abstractmethod
    def measure(self, point: Point, watch: Watch) -> Report:
        """Entries of one point, and what else is to be noted about it."""

    def _attempt(self, point: Point, watch: Watch) -> Report:
        """Measure a point; if that cannot be done, say why: the next ones may fit."""
        try:
            return self.measure(point, watch)
        except Exception as error:
            return [], {"failed": reason(error)}

    def run(self) -> Record:
        """Measure every point, write after each."""
        if self.threads:
            torch.set_num_threads(self.threads)
        dtype = str(self.torch_dtype()).removeprefix("torch.")
        settings = {"device": str(self.torch_device()), "dtype": dtype}  # how long is in each point's command
        record = Record(self.what, self.title, self.note, self.torch_device(), self.output, settings, type(self).draw)
        points = self.chosen_points()
        console = Console(stderr=True)
        if not points:
            titles = "; ".join(point.title for point in self.points())
            console.print(f"{self.what}: no point to --select among {titles}")
            return record
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            for number, point in enumerate(points, 1):
                task = progress.add_task(f"{self.what} {number}/{len(points)} {point.title}", total=1.0)

                def watch(_: int, share: float, task: Any = task) -> None:
                    progress.update(task, completed=min(share, 1.0))

                entries, about = self._attempt(point, watch)
                if "failed" in about:
                    console.print(f"{self.what}, {point.title}: failed, {about['failed']}", markup=False)
                record.add(point, entries, about)
                progress.update(task, completed=1.0)
                gc.collect()  # models are full of cycles
        console.print(f"Written: {record.path('md')} (.json, .png)", soft_wrap=True)
        return record
