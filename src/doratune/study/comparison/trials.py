"""The grid: which runs there are, which are done, and which learning rate is chosen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from doratune.study.comparison.recipe import Comparison

Stage = Literal["sweep", "test"]


@dataclass(frozen=True)
class Trial:
    """One training run of the grid."""

    stage: Stage
    """sweep: to choose the learning rate, scored on evaluation data; test: with the chosen one, scored on test data."""
    contestant: str
    """Its key."""
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    trial: Trial
    result: Mapping[str, Any] | None
    """Fields of ``TrainResult``; None if training diverged."""
    problem: str | None = None
    """Why there is no result."""

    def score(self, by_accuracy: bool) -> float | None:
        """Accuracy in percent or loss in nats, of the data of its stage; None if training diverged."""
        if self.result is None:
            return None
        names = ("test_accuracy", "test_loss") if self.trial.stage == "test" else ("accuracy_after", "loss_after")
        return round(100.0 * self.result[names[0]], 9) if by_accuracy else float(self.result[names[1]])


@dataclass(frozen=True)
class Chosen:
    """The learning rate that a contestant goes on with."""

    learning_rate: float
    at_edge: Literal["lowest", "highest", ""]
    """Whether it is an end of what was tried, so that a better one may lie outside."""


def sweep(comparison: Comparison) -> list[Trial]:
    """Every learning rate of every contestant with a few seeds, seed by seed; one with a single rate is not swept."""
    return [
        Trial("sweep", one.key, rate, seed)
        for seed in range(comparison.grid.sweep_seeds)
        for one in comparison.contestants
        for rate in comparison.grid.rates(one)
        if len(comparison.grid.rates(one)) > 1
    ]


def scoring(comparison: Comparison, chosen: Mapping[str, Chosen]) -> list[Trial]:
    """Every contestant with its chosen rate and many seeds, none of which the sweep used; seed by seed."""
    first = comparison.grid.sweep_seeds
    return [
        Trial("test", one.key, chosen[one.key].learning_rate, seed)
        for seed in range(first, first + comparison.grid.seeds)
        for one in comparison.contestants
        if one.key in chosen
    ]


def size(comparison: Comparison) -> int:
    """How many runs there are in all."""
    return len(sweep(comparison)) + comparison.grid.seeds * len(comparison.contestants)


def choose(comparison: Comparison, outcomes: Iterable[Outcome]) -> dict[str, Chosen] | None:
    """The best learning rate of each contestant by its mean score on evaluation data; of equals the lowest loss.

    Rates at which a run diverged are out.

    Returns:
        By the contestant's key; None while runs of the sweep are missing, and without those whose every rate diverged.
    """
    done = {outcome.trial: outcome for outcome in outcomes}
    found = {}
    for one in comparison.contestants:
        rates = comparison.grid.rates(one)
        if len(rates) == 1:
            found[one.key] = Chosen(rates[0], "")
            continue
        runs = {
            rate: [done.get(Trial("sweep", one.key, rate, seed)) for seed in range(comparison.grid.sweep_seeds)]
            for rate in rates
        }
        if any(run is None for at_rate in runs.values() for run in at_rate):
            return None
        ranked = sorted((_worth(at_rate, comparison.by_accuracy), rate) for rate, at_rate in runs.items())
        worth, best = ranked[0]
        if worth[0] < math.inf:
            edge: Any = "lowest" if best == rates[0] else "highest" if best == rates[-1] else ""
            found[one.key] = Chosen(best, edge)
    return found


def _worth(runs: Sequence[Outcome | None], by_accuracy: bool) -> tuple[float, float]:
    """Sort key, best first: mean score (negative where it is accuracy), then mean loss; infinite if a run diverged."""
    results = [run.result for run in runs if run is not None and run.result is not None]
    if len(results) < len(runs):
        return math.inf, math.inf
    loss = statistics.fmean(result["loss_after"] for result in results)
    return (-statistics.fmean(result["accuracy_after"] for result in results) if by_accuracy else loss), loss


def grid(comparison: Comparison, outcomes: Sequence[Outcome]) -> list[Trial]:
    """The runs that can be done now: the sweep, and once it is over the tests, too."""
    chosen = choose(comparison, outcomes)
    return [*sweep(comparison), *([] if chosen is None else scoring(comparison, chosen))]
