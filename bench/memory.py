"""Bytes kept for the backward pass, and peak memory of a training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bench.contestants import Contestant
from bench.options import Benchmark, Report, Watch
from bench.peak import peak_bytes
from bench.results import Point
from bench.step import model_trial
from bench.trial import Trial
from doratune.ops.hardware import multiplies
from doratune.study.footprint import saved_bytes


@dataclass
class Memory(Benchmark):
    """Memory of a training step of a language model."""

    what: ClassVar[str] = "memory"
    title: ClassVar[str] = "Memory of a training step"
    note: ClassVar[str] = (
        "Megabytes (10^6 bytes). Saved: unique storages kept for the backward pass, without parameters, buffers and "
        "inputs. Peak: most that was allocated at any moment of the step above what was there before it, gradients of "
        "the parameters included, without the optimiser; with the model: and its parameters. Where the processor does "
        "not multiply the dtype only what is saved is measured, which takes no backward pass."
    )

    def points(self) -> list[Point]:
        if self.quick:
            return [Point("tiny", {"model": "tiny", "tokens": 64, "rank": 16})]
        points = [("llama-6-layers", "", 1024), ("llama-6-layers", "checkpointing", 1024)]
        if self.torch_device().type == "cuda":
            points += [("llama-1b", "", 8192), ("llama-1b", "checkpointing", 8192)]
        elif self.full:
            points += [("llama-1b", "", 512), ("llama-1b", "checkpointing", 512)]
        return [
            Point(
                f"{name}{', ' + variant if variant else ''}, {tokens:,} tokens",
                {"model": name, "variant": variant, "tokens": tokens, "rank": 16},
            )
            for name, variant, tokens in points
        ]

    def measure(self, point: Point, watch: Watch) -> Report:
        trial, weights = model_trial(self, point, True)
        if self._whole_steps():
            trial.check()  # and allocate what is allocated once and for good
        for number, name in enumerate(list(trial.contestants), 1):
            trial.attempt(name, lambda name: self._measure(trial, trial.contestants[name], point))
            watch(number, number / len(trial.entries))
        return trial.report(), {"weights": weights}

    def _measure(self, trial: Trial, contestant: Contestant, point: Point) -> None:
        model, task = contestant.model, trial.task
        measured = {}
        if point.shape.get("variant") != "checkpointing":  # which keeps little else than the layers' inputs
            self._fresh(trial, contestant)
            known = [*model.parameters(), *model.buffers(), task.inputs]
            measured["saved MB"] = saved_bytes(lambda: task.forward(model), known) / 1e6
        self._fresh(trial, contestant)
        if self._whole_steps():
            measured["peak MB"] = peak_bytes(lambda: trial.step(contestant), self.torch_device()) / 1e6
            tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
            measured["with the model MB"] = measured["peak MB"] + sum(tensors.values()) / 1e6
            self._fresh(trial, contestant)
        trial.entries[contestant.name].measured = measured

    def _whole_steps(self) -> bool:
        """A backward pass in plain loops would take hours."""
        return multiplies(self.torch_dtype(), self.torch_device())

    @staticmethod
    def _fresh(trial: Trial, contestant: Contestant) -> None:
        contestant.take(trial.values, 0)
        trial.task.inputs.grad = None
