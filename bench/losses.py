"""Does a PEFT model learn the same after `dt.peft.accelerate`?"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bench.bases import linear_paths, llama
from bench.contestants import ACCELERATED, BUILDERS, Contestant, Setting
from bench.options import Benchmark, Report, Watch
from bench.results import Point
from bench.tasks import ModelTask
from bench.trial import moved_adapters

TOLERANCE = 1e-4
"""Of the relative difference of losses in float32: rounding, carried on over the steps."""
MORE_ROUNDING = 1.5
"""In 16 bits the gradients of the first step may be so many times as far from float32 as PEFT's: steps carry rounding
on in ways of their own."""


@dataclass
class Losses(Benchmark):
    """Training losses of PEFT's DoRA with and without doratune underneath, same seeds, dropout 0 and 0.05."""

    steps: int = 20
    """Of AdamW at a learning rate of 1e-3, on the same 256 tokens."""

    what: ClassVar[str] = "losses"
    title: ClassVar[str] = "Losses of PEFT's DoRA, accelerated or not"
    note: ClassVar[str] = (
        "The same adapters, seeds and data; AdamW. Largest difference: of the losses of the same step, from PEFT's. "
        "Rounding, in 16 bits: relative distance of the first step's gradients of A, B and m from PEFT's in float32. "
        "Parameters moved: how far the adapters' parameters went from their start, and how far apart they ended, both "
        "in the Euclidean norm over all of them."
    )

    def points(self) -> list[Point]:
        model, tokens = ("tiny", 64) if self.quick else ("llama-6-layers", 256)
        return [Point(f"{model}, {self.steps} steps", {"model": model, "tokens": tokens, "rank": 16})]

    def measure(self, point: Point, watch: Watch) -> Report:
        base, weights = llama(point.shape["model"], self.torch_dtype(), self.torch_device())
        setting = Setting(linear_paths(base), point.shape["rank"])
        values, task = moved_adapters(base, setting), ModelTask(base, point.shape["tokens"])
        exact = self._exact(base, setting, values, task)
        pairs = [(name.removesuffix(ACCELERATED), name) for name in self.contestants() if name.endswith(ACCELERATED)]
        entries = []
        for number, (plain, accelerated) in enumerate(pairs, 1):
            runs = []
            for name in (plain, accelerated):
                contestant = BUILDERS[name](base, setting)
                contestant.take(values, 0)
                runs.append(self._train(contestant, task))
            (losses, gradients, start, end), (found, gradients_found, _, end_found) = runs
            measured = {
                "first loss": losses[0],
                "last loss": losses[-1],
                "largest difference": _largest_difference(losses, found),
                "parameters moved": float((end - start).norm()),
                "ended apart": float((end_found - end).norm()),
            }
            apart = measured["largest difference"] / abs(losses[0])
            right = apart <= TOLERANCE
            if exact:
                true = exact["dropout" in plain]
                measured["PEFT's rounding"] = float((gradients - true).norm() / true.norm())
                measured["accelerated's rounding"] = float((gradients_found - true).norm() / true.norm())
                right = measured["accelerated's rounding"] <= MORE_ROUNDING * measured["PEFT's rounding"]
            status = "right" if right else "wrong"
            entries.append({"name": accelerated, "status": status, "error": {"loss": apart}, "measured": measured})
            watch(number, number / len(pairs))
        return entries, {"weights": weights}

    def _exact(self, base: Any, setting: Setting, values: Any, task: ModelTask) -> dict[bool, Any]:
        """PEFT's first gradients with a float32 base, without and with dropout, unless the base is float32 anyway."""
        if self.torch_dtype() == torch.float32:
            return {}
        base = copy.deepcopy(base).float()
        task, found = ModelTask(base, task.ids.numel()), {}
        for dropout, name in ((False, "PEFT DoRA float32"), (True, "PEFT DoRA float32, dropout")):
            contestant = BUILDERS[name](base, setting)
            contestant.take(values, 0)
            found[dropout] = self._train(contestant, task, 1)[1]
        return found

    def _train(
        self, contestant: Contestant, task: ModelTask, steps: int | None = None
    ) -> tuple[list[float], Any, Any, Any]:
        """Losses, the first step's gradients, and the parameters before and after."""
        parameters = [t for tensors in contestant.adapters.values() for t in tensors if t is not None]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        contestant.model.train()
        start, losses, gradients = _flat(parameters), [], None
        for seed in range(steps or self.steps):
            torch.manual_seed(seed)  # of dropout
            loss = task.forward(contestant.model)
            task.backward(loss)
            gradients = _flat([p.grad for p in parameters]) if gradients is None else gradients
            optimizer.step()
            optimizer.zero_grad()
            task.inputs.grad = None
            losses.append(float(loss))
        return losses, gradients, start, _flat(parameters)


def _largest_difference(losses: list[float], others: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, others, strict=True))


def _flat(parameters: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in parameters])
