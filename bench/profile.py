"""Where the time of doratune's step goes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from bench.contestants import DORA, FROZEN, LORA, Contestant
from bench.options import Benchmark, Report, Watch
from bench.results import Point
from bench.step import model_trial
from bench.trial import Trial
from doratune.ops import compose, dense, low_rank, row_norm

PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "norm": ((row_norm, "squared_row_norm"), (row_norm, "row_scale")),
    "outputs, forward": ((compose, "scale_in_place"), (dense, "scale_in_place")),
    "outputs, backward": ((compose, "scaled_backward"), (dense, "scaled_backward")),
    "A and B, backward": ((low_rank, "low_rank_gradients"), (dense, "low_rank_gradients")),
}
"""What is told apart, and the functions that do it."""
STEPS = 5
"""That are profiled, after as many that are not."""


@dataclass
class Profile(Benchmark):
    """Where the time of a training step goes, by torch's profiler."""

    what: ClassVar[str] = "profile"
    title: ClassVar[str] = "Where the time of a training step goes"
    note: ClassVar[str] = (
        f"Milliseconds by torch's profiler, mean of {STEPS} steps; it makes small operations slower than they are. The "
        "parts are in the step. Norm: of W + s B A and m over it. Outputs: the pass over each layer's output, forward "
        "(g u) and backward (g dy and the magnitudes' gradient). A and B, backward: their gradients and their part of "
        "the input's; with LoRA, too. Operations: calls that Python or autograd makes, in one step."
    )

    def points(self) -> list[Point]:
        model, tokens = ("tiny", 64) if self.quick else ("llama-6-layers", 1024)
        return [Point(f"{model}, {tokens:,} tokens", {"model": model, "tokens": tokens, "rank": 16})]

    def measure(self, point: Point, watch: Watch) -> Report:
        self.only = self.only or (DORA, LORA)
        trial, weights = model_trial(self, point, True, "dropout", "8-bit")
        trial.check()
        for number, name in enumerate(list(trial.contestants), 1):
            trial.attempt(name, lambda name: self._measure(trial, trial.contestants[name]))
            watch(number, number / len(trial.entries))
        trial.check()
        return trial.report(), {"weights": weights}

    def _measure(self, trial: Trial, contestant: Contestant) -> None:
        def step(number: int) -> None:
            contestant.take(trial.values, number)
            trial.task.inputs.grad = None
            with record_function("step"):
                trial.step(contestant)
                if trial.task.inputs.is_cuda:
                    torch.cuda.synchronize()

        for number in range(STEPS):
            step(number)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if trial.task.inputs.is_cuda else [])]
        with _told_apart(), profile(activities=activities) as found:
            for number in range(STEPS):
                step(number)
        measured = {"step": _milliseconds(found, "step")}
        if contestant.name != FROZEN:
            measured |= {part: ms for part in PARTS if (ms := _milliseconds(found, part))}
        outermost = [e for e in found.events() if e.name.startswith("aten::") and not _within_operation(e)]
        trial.entries[contestant.name].measured = {**measured, "operations": len(outermost) / STEPS}


def _milliseconds(found: Any, name: str) -> float:
    """Of all ranges of that name, a step; on a GPU what its kernels or their starting take, whichever is more."""
    # Each range shows up a second time among the device's events.
    events = [event for event in found.events() if event.name == name and event.device_type == DeviceType.CPU]
    return sum(max(event.cpu_time_total, event.device_time_total) for event in events) / STEPS / 1e3


def _within_operation(event: Any) -> bool:
    parent = event.cpu_parent
    return parent is not None and (parent.name.startswith("aten::") or _within_operation(parent))


@contextlib.contextmanager
def _told_apart() -> Iterator[None]:
    """Have the functions of each part leave its name in the profile."""
    before = [(module, name, getattr(module, name)) for functions in PARTS.values() for module, name in functions]
    try:
        for part, functions in PARTS.items():
            for module, name in functions:
                setattr(module, name, _named(part, getattr(module, name)))
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)


def _named(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def within(*args: Any, **kwargs: Any) -> Any:
        with record_function(part):
            return function(*args, **kwargs)

    return within
