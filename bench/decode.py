"""One decode step, and one evaluation forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from bench.contestants import EIGHT_BIT, FULL, Contestant, merged
from bench.options import Benchmark, Options, Report, Watch
from bench.results import Point
from bench.step import model_trial
from bench.tasks import DecodeTask
from bench.trial import Trial


@dataclass
class Decode(Benchmark):
    """The next token with a real cache of keys and values, adapters unmerged and merged."""

    seconds: float = 60.0
    cached: int = 64
    """Tokens in the cache."""

    what: ClassVar[str] = "decode"
    title: ClassVar[str] = "One decode step"
    note: ClassVar[str] = (
        "Evaluation, no gradients, one sequence; time relative to the frozen model, median of paired ratios with its "
        "95 % interval. Before each timed step the adapters change and the cache is filled anew (not timed), as at the "
        "beginning of a generation; logits are compared with a plain reference before and after."
    )

    def points(self) -> list[Point]:
        large = self.full or self.torch_device().type == "cuda"
        names = ["tiny"] if self.quick else ["llama-6-layers", *(["llama-1b"] if large else [])]
        return [
            Point(f"{name}, {self.cached} cached tokens", {"model": name, "tokens": self.cached, "rank": 16})
            for name in names
        ]

    def measure(self, point: Point, watch: Watch) -> Report:
        trial, weights = model_trial(self, point, False, FULL, "dropout", EIGHT_BIT, make_task=DecodeTask)
        add_merged(trial, self)
        trial.race(
            lambda contestant: trial.task.decode(contestant.model),
            lambda contestant: trial.task.prefill(contestant.model),
            **self.race_options(watch),
        )
        return trial.report(), {"weights": weights}


@dataclass
class Eval(Benchmark):
    """The forward pass of an evaluation: no gradients, many tokens."""

    what: ClassVar[str] = "eval"
    title: ClassVar[str] = "Evaluation forward pass of a language model"
    note: ClassVar[str] = (
        "No gradients; time relative to the frozen model, median of paired ratios with its 95 % interval. After each "
        "change of the adapters 8 tokens are computed untimed, which is when caches are filled; logits are compared "
        "with a plain reference before and after."
    )

    def points(self) -> list[Point]:
        names, tokens = (["tiny"], 64) if self.quick else (["llama-6-layers"], 1024)
        if not self.quick and (self.full or self.torch_device().type == "cuda"):
            names.append("llama-1b")
        return [Point(f"{n}, {tokens:,} tokens", {"model": n, "tokens": tokens, "rank": 16}) for n in names]

    def measure(self, point: Point, watch: Watch) -> Report:
        trial, weights = model_trial(self, point, False, FULL, "dropout", EIGHT_BIT)
        add_merged(trial, self)

        @torch.no_grad()
        def few_tokens(contestant: Contestant) -> None:
            contestant.model(inputs_embeds=trial.task.inputs[:, :8], use_cache=False)

        @torch.no_grad()
        def forward(contestant: Contestant) -> None:
            trial.task.output(contestant.model)

        trial.race(forward, few_tokens, **self.race_options(watch))
        return trial.report(), {"weights": weights}


def add_merged(trial: Trial, options: Options) -> None:
    """Merged DoRA as two more contestants, in the twin too: it is compared there."""
    if trial.twin is not None:
        add_merged(trial.twin, options)
    for contestant in merged(trial.base, trial.setting, trial.values):
        if not options.only or any(text in contestant.name for text in options.only):
            trial.add(contestant)
