"""What the runs say: scores, differences, sensitivity and cost, as numbers."""

from __future__ import annotations

import dataclasses
import statistics as plain
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from doratune.study.comparison import trials
from doratune.study.comparison.contestants import RANKED, Contestant, Pair
from doratune.study.comparison.recipe import Comparison
from doratune.study.comparison.signed_rank import Typical, typical
from doratune.study.comparison.statistics import Difference, MeanInterval, difference, mean_interval, of_each
from doratune.study.comparison.trials import Chosen, Outcome, Trial
from doratune.study.race import median_interval


@dataclass(frozen=True)
class Standing:
    """One contestant."""

    contestant: Contestant
    chosen: Chosen
    scores: Mapping[int, float]
    """On test data, by seed."""
    score: MeanInterval | None
    """None if no run came to an end."""
    diverged: int
    """Test runs that did."""
    sweep: Mapping[float, Sequence[float | None]]
    """Scores on evaluation data by learning rate, None where training diverged."""
    sizes: Mapping[str, int]
    """Parameters: trained, base, direction, magnitude."""
    step_seconds: float
    """Median over its test runs."""
    step_ratio: tuple[float, float, float] | None
    """Median of the ratios to the first method's steps of the same seed, and its 95 % interval."""
    peak_memory: float
    """Bytes; mean over its test runs."""

    @property
    def extra_over_lora(self) -> float:
        """Magnitude parameters per LoRA parameter."""
        return self.sizes["magnitude"] / self.sizes["direction"] if self.sizes.get("direction") else 0.0

    @property
    def extra_over_model(self) -> float:
        """Magnitude parameters per parameter of the base model."""
        return self.sizes["magnitude"] / self.sizes["base"] if self.sizes.get("base") else 0.0


@dataclass(frozen=True)
class Gap:
    """A paired difference of test scores."""

    pair: Pair
    seeds: Sequence[int]
    difference: Difference
    """Of the means: what a user can expect, collapsed runs included."""
    typical: Typical | None
    """Of the typical seed; None for too few seeds."""
    confidence: float
    together: int
    """So many differences lie in their intervals together with that confidence."""


@dataclass(frozen=True)
class RankSpread:
    """How far a method's test scores of one seed lie apart over the ranks: highest minus lowest, mean over seeds."""

    method: str
    ranks: Sequence[int]
    spread: MeanInterval


@dataclass(frozen=True)
class Findings:
    """Everything that a comparison found."""

    comparison: Comparison
    standings: Sequence[Standing]
    gaps: Sequence[Gap]
    rank_spreads: Sequence[RankSpread]
    rank_difference: Difference | None
    """DoRA's spread over the ranks minus LoRA's, seed by seed."""
    outcomes: Sequence[Outcome]
    """Every run."""
    test_examples: int
    device: str
    problems: Sequence[str]
    replaced: Mapping[tuple[Contestant, float], int]
    """Test runs that do not count, by contestant and rate: that was the best before more rates were tried."""

    @property
    def runs(self) -> int:
        """How many there are."""
        return len(self.outcomes)

    @property
    def unit(self) -> str:
        """Of scores."""
        return "points" if self.comparison.by_accuracy else "nats"

    @property
    def sign(self) -> int:
        """1 where a higher score is better, -1 where a lower is."""
        return 1 if self.comparison.by_accuracy else -1

    def as_json(self) -> dict[str, Any]:
        """All numbers; those of single runs are a table's."""
        return {
            "task": self.comparison.train.task,
            "model": self.comparison.train.model,
            "score": "test accuracy in percent" if self.comparison.by_accuracy else "test loss in nats",
            "test_examples": self.test_examples,
            "confidence": self.comparison.grid.confidence,
            "runs": self.runs,
            "device": self.device,
            "standings": [_standing_json(one) for one in self.standings],
            "differences": [
                {
                    "other": gap.pair.other.key,
                    "base": gap.pair.base.key,
                    **dataclasses.asdict(gap.difference),
                    "typical": None if gap.typical is None else dataclasses.asdict(gap.typical),
                    "together": gap.together,
                    "found": gap.difference.is_found,
                    "seeds": list(gap.seeds),
                }
                for gap in self.gaps
            ],
            "rank_spreads": [dataclasses.asdict(one) for one in self.rank_spreads],
            "rank_difference": None if self.rank_difference is None else dataclasses.asdict(self.rank_difference),
            "problems": list(self.problems),
            "replaced": [
                {"contestant": one.key, "learning_rate": rate, "runs": count}
                for (one, rate), count in self.replaced.items()
            ],
        }


def find(comparison: Comparison, outcomes: Sequence[Outcome]) -> Findings:
    """Put the runs of a comparison together; seeds whose run diverged are in no pair, but in ``problems``."""
    chosen = trials.choose(comparison, outcomes) or {}
    done = {outcome.trial: outcome for outcome in outcomes}
    over = [done[trial] for trial in trials.grid(comparison, outcomes) if trial in done]
    tests = {
        one.key: [o for o in over if (o.trial.stage, o.trial.contestant) == ("test", one.key)]
        for one in comparison.contestants
    }
    by_key = {one.key: _seconds(tests[one.key]) for one in comparison.contestants}
    first = by_key[comparison.contestants[0].key]
    standings = [
        _standing(comparison, one, chosen[one.key], tests[one.key], done, by_key[one.key], first)
        for one in comparison.contestants
        if one.key in chosen
    ]
    results = [o.result for runs in tests.values() for o in runs if o.result is not None]
    scores = {one.contestant: one.scores for one in standings}
    spreads, rank_difference = _over_ranks(comparison, scores)
    return Findings(
        comparison,
        standings,
        _gaps(comparison, scores),
        spreads,
        rank_difference,
        test_examples=results[0]["test_examples"] if results else 0,
        outcomes=over,
        device=results[0]["device"] if results else "",
        problems=[f"{name_of(comparison, o.trial)}: {o.problem}" for o in over if o.problem],
        replaced=_replaced(comparison, outcomes, chosen),
    )


def _replaced(
    comparison: Comparison, outcomes: Sequence[Outcome], chosen: Mapping[str, Chosen]
) -> dict[tuple[Contestant, float], int]:
    by_key = {one.key: one for one in comparison.contestants if one.key in chosen}
    tested = [o.trial for o in outcomes if o.trial.stage == "test" and o.trial.contestant in by_key]
    return dict(
        Counter(
            (by_key[trial.contestant], trial.learning_rate)
            for trial in tested
            if trial.learning_rate != chosen[trial.contestant].learning_rate
        )
    )


def _standing(
    comparison: Comparison,
    one: Contestant,
    chosen: Chosen,
    runs: Sequence[Outcome],
    done: Mapping[Trial, Outcome],
    seconds: Mapping[int, float],
    first: Mapping[int, float],
) -> Standing:
    scores = {o.trial.seed: s for o in runs if (s := o.score(comparison.by_accuracy)) is not None}
    results = [o.result for o in runs if o.result is not None]
    ratios = [seconds[seed] / first[seed] for seed in seconds if seed in first]
    rates = comparison.grid.rates(one)
    sweep = {
        rate: [
            done[trial].score(comparison.by_accuracy)
            for seed in range(comparison.grid.sweep_seeds)
            if (trial := Trial("sweep", one.key, rate, seed)) in done
        ]
        for rate in (rates if len(rates) > 1 else ())
    }
    return Standing(
        one,
        chosen,
        scores,
        mean_interval(list(scores.values()), comparison.grid.confidence) if scores else None,
        diverged=len(runs) - len(scores),
        sweep=sweep,
        sizes={k: results[0][k] for k in ("trained", "base", "direction", "magnitude")} if results else {},
        step_seconds=plain.median(seconds.values()) if seconds else 0.0,
        step_ratio=(plain.median(ratios), *median_interval(ratios)) if ratios else None,
        peak_memory=plain.fmean(result["peak_memory"] for result in results) if results else 0.0,
    )


def _seconds(runs: Sequence[Outcome]) -> dict[int, float]:
    """Of a training step, by seed."""
    return {o.trial.seed: o.result["seconds"] / o.result["steps"] for o in runs if o.result is not None}


def _gaps(comparison: Comparison, scores: Mapping[Contestant, Mapping[int, float]]) -> list[Gap]:
    """Differences of ranked methods are one family, those of the others another: each has the confidence as a whole."""
    found = []
    for claims in (True, False):
        family = [pair for pair in comparison.pairs if pair.is_claim == claims]
        for pair in family:
            other, base = scores.get(pair.other, {}), scores.get(pair.base, {})
            seeds = sorted(set(other) & set(base))
            if len(seeds) >= 2:
                level, together = comparison.grid.confidence, len(family)
                apart = [other[s] - base[s] for s in seeds]
                each = of_each(level, together)
                found.append(Gap(pair, seeds, difference(apart, each), typical(apart, each), level, together))
    return found


def _over_ranks(
    comparison: Comparison, scores: Mapping[Contestant, Mapping[int, float]]
) -> tuple[list[RankSpread], Difference | None]:
    level = comparison.grid.confidence
    spreads: dict[str, dict[int, float]] = {}
    found = []
    of_method = {method: {one.rank for one in scores if one.method == method} for method in RANKED}
    common = set.intersection(*of_method.values())
    for method in RANKED:
        # Over the same ranks, so that the two can be compared: "dora r/2" adds lower ones.
        wanted = common if len(common) >= 3 else of_method[method]
        ranked = [one for one in scores if one.method == method and one.rank in wanted]
        if len(ranked) < 3:
            continue
        seeds = set.intersection(*(set(scores[one]) for one in ranked))
        values = {seed: [scores[one][seed] for one in ranked] for seed in sorted(seeds)}
        spreads[method] = {seed: max(row) - min(row) for seed, row in values.items()}
        if len(spreads[method]) >= 2:
            ranks = sorted(one.rank for one in ranked if one.rank is not None)
            found.append(RankSpread(method, ranks, mean_interval(list(spreads[method].values()), level)))
    if len(found) < 2 or found[0].ranks != found[1].ranks:
        return found, None
    seeds = set(spreads["lora"]) & set(spreads["dora"])
    apart = [spreads["dora"][seed] - spreads["lora"][seed] for seed in sorted(seeds)]
    return found, difference(apart, level) if len(seeds) >= 2 else None


def name_of(comparison: Comparison, trial: Trial) -> str:
    """A run in words."""
    one = next(one for one in comparison.contestants if one.key == trial.contestant)
    return f"{one.name}, learning rate {trial.learning_rate:g}, seed {trial.seed}"


def _standing_json(one: Standing) -> dict[str, Any]:
    return {
        "contestant": one.contestant.key,
        "method": one.contestant.method,
        "rank": one.contestant.rank,
        "learning_rate": one.chosen.learning_rate,
        "at_edge": one.chosen.at_edge,
        "score": None if one.score is None else dataclasses.asdict(one.score),
        "scores": {str(seed): score for seed, score in one.scores.items()},
        "diverged": one.diverged,
        "sweep": {f"{rate:g}": list(values) for rate, values in one.sweep.items()},
        **one.sizes,
        "extra_over_lora": one.extra_over_lora,
        "extra_over_model": one.extra_over_model,
        "step_seconds": one.step_seconds,
        "step_ratio": None if one.step_ratio is None else list(one.step_ratio),
        "peak_memory": one.peak_memory,
    }
