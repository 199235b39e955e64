"""One trial: contestants with the same moved adapters are checked, raced and checked again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from bench.bases import dense_weight
from bench.check import Errors, Observation, errors, observe, reference
from bench.contestants import BUILDERS, DORA, FROZEN, Builder, Contestant, Setting
from bench.results import reason
from bench.tasks import Task
from doratune.study.moved import MovedAdapter, moved_adapter
from doratune.study.race import Lane, Timing, race

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 6e-2}
"""Of the relative errors in Euclidean norm: many layers' rounding; leaving out the norm makes 0.1 and more."""


@dataclass
class Entry:
    """What became of one contestant."""

    name: str
    status: Literal["right", "wrong", "failed", "reference"]
    note: str = ""
    error: dict[str, float] | None = None
    timing: dict[str, Any] | None = None
    measured: dict[str, float] | None = None


def moved_adapters(base: nn.Module, setting: Setting) -> dict[str, MovedAdapter]:
    """The values that all contestants get."""
    values = {}
    for seed, path in enumerate(setting.paths):
        W = dense_weight(base.get_submodule(path))
        tiles = [(slice(0, W.shape[0]), W)]
        values[path] = moved_adapter(tiles, (W.shape[0], W.shape[1]), setting.rank, setting.scale, seed)
    return values


class Trial:
    """Contestants on one base, and what is found out about each."""

    def __init__(
        self,
        base: nn.Module,
        setting: Setting,
        names: Sequence[str],
        task: Task,
        training: bool = True,
        twin: Trial | None = None,
    ) -> None:
        self.base, self.setting, self.task, self.training = base, setting, task, training
        self.twin = twin
        """The same contestants on a base whose rounding leaves mistakes to be seen; compared in this one's place."""
        self.values = self.moved()
        self.entries = {name: Entry(name, "reference") for name in names}
        self.contestants: dict[str, Contestant] = {}
        self._expected: dict[tuple[str, str], Observation] = {}
        for name in names:
            self.attempt(name, self._build)

    builders: ClassVar[dict[str, Builder]] = BUILDERS

    def moved(self) -> dict[str, MovedAdapter]:
        """The values that all contestants get."""
        return moved_adapters(self.base, self.setting)

    def reference(self, like: Contestant) -> Contestant:
        """What computes a contestant's method plainly."""
        return reference(self.base, self.values, self.setting, like)

    def attempt(self, name: str, action: Callable[[str], Any]) -> Any:
        """Do something with a contestant; if it cannot, it is out, with the reason."""
        try:
            return action(name)
        except Exception as error:
            self._fail(name, error)
        gc.collect()  # only now: the traceback kept what was allocated when it failed
        return None

    def _fail(self, name: str, error: Exception) -> None:
        self.contestants.pop(name, None)
        self.entries[name] = Entry(name, "failed", reason(error))

    def _build(self, name: str) -> None:
        contestant = self.builders[name](self.base, self.setting)
        contestant.model.train(self.training)
        contestant.take(self.values, 0)
        self.contestants[name] = contestant

    def add(self, contestant: Contestant) -> None:
        """One more contestant, made by hand."""
        contestant.model.train(self.training)
        self.contestants[contestant.name] = contestant
        self.entries[contestant.name] = Entry(contestant.name, "reference")

    def check(self) -> None:
        """Compare everybody with the reference; who is wrong is out."""
        if self.twin is not None:
            self._adopt(self.twin)
            return
        for name in list(self.contestants):
            self.attempt(name, self._check)

    def _adopt(self, twin: Trial) -> None:
        """What becomes of a contestant in the twin becomes of it here."""
        twin.check()
        for name in list(self.contestants):
            if (found := twin.entries.get(name)) is None:
                self.attempt(name, self._check)  # or it would be timed unchecked
            elif name in twin.contestants:
                self.entries[name].error, self.entries[name].status = found.error, found.status
            else:
                self.entries[name] = found
                del self.contestants[name]

    def _check(self, name: str) -> None:
        contestant = self.contestants[name]
        if contestant.method not in ("lora", "dora"):
            return
        contestant.take(self.values, 0)
        found = errors(observe(self.task, contestant, self.training), self._expect(contestant))
        contestant.model.train(self.training)
        entry = self.entries[name]
        worst = found if entry.error is None else Errors(**_worst(entry.error, asdict(found)))
        entry.error, entry.status = asdict(worst), "right"
        if not worst.within(max(TOLERANCE[self.task.inputs.dtype], contestant.tolerance)):
            self.entries[name] = Entry(name, "wrong", error=asdict(worst))
            del self.contestants[name]

    def _expect(self, contestant: Contestant) -> Observation:
        key = (contestant.method, contestant.norm_gradient)
        if key not in self._expected:
            self._expected[key] = observe(self.task, self.reference(contestant), self.training)
        return self._expected[key]

    def race(
        self,
        run: Callable[[Contestant], Any],
        before: Callable[[Contestant], Any] | None = None,
        **options: Any,
    ) -> None:
        """Check, time ``run`` for every contestant, check again."""
        self.check()
        for name in list(self.contestants):  # the warm-up; who cannot run at all is out before the race
            self.attempt(name, lambda name: self._try(self._lane(name, run, before)))
        if FROZEN not in self.contestants:
            return
        lanes = [self._lane(name, run, before) for name in self.contestants]
        # Having fitted once is no promise: who fails now is out, too.
        timings = {timing.name: timing for timing in race(lanes, FROZEN, warm_up=0, failed=self._fail, **options)}
        if FROZEN not in timings:
            return
        self.check()
        for name in self.contestants:
            self.entries[name].timing = _numbers(timings[name])
            if DORA in self.contestants:
                self.entries[name].timing["dora_over"] = timings[DORA].over(timings[name])

    def _try(self, lane: Lane) -> None:
        if lane.before is not None:
            lane.before(0)
        lane.run()
        if lane.after is not None:
            lane.after()

    def _lane(self, name: str, run: Callable[[Contestant], Any], before: Callable[[Contestant], Any] | None) -> Lane:
        # Looked up in each round: a lane must not keep the memory of a contestant that is out.
        def prepare(round_number: int) -> None:
            self.contestants[name].take(self.values, round_number)
            self.task.inputs.grad = None
            if before is not None:
                before(self.contestants[name])

        def drop_gradients() -> None:
            self.contestants[name].model.zero_grad(set_to_none=True)
            self.task.inputs.grad = None

        return Lane(name, lambda: run(self.contestants[name]), prepare, drop_gradients)

    def step(self, contestant: Contestant) -> None:
        """Forward and backward."""
        self.task.backward(self.task.forward(contestant.model))

    def report(self) -> list[dict[str, Any]]:
        """The entries as plain data."""
        return report(self.entries.values())


def report(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """Entries as plain data, without what they lack."""
    return [{key: value for key, value in asdict(entry).items() if value} for entry in entries]


def _worst(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {key: max(value, other[key]) for key, value in one.items()}


def _numbers(timing: Timing) -> dict[str, Any]:
    numbers = asdict(timing)
    del numbers["name"], numbers["seconds"]
    return numbers
