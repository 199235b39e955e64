"""What was found, in plain sentences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from doratune.study.comparison.contestants import RANKED
from doratune.study.comparison.findings import Findings, Gap, Standing
from doratune.study.comparison.signed_rank import Typical
from doratune.study.comparison.statistics import POWER, MeanInterval


def digits(unit: str) -> str:
    """How scores and differences are formatted: points with two digits after the point, nats with four."""
    return ".2f" if unit == "points" else ".4f"


def number(value: float, unit: str, signed: bool = False) -> str:
    """A score or difference."""
    return format(value, ("+" if signed else "") + digits(unit)).replace("-", "−")


def percent(share: float, places: int = 0) -> str:
    """A share in percent; without digits after the point only if there are none."""
    return f"{100 * share:.{places}f}\u00a0%" if places else f"{round(100 * share, 6):g}\u00a0%"


def interval(found: MeanInterval | Typical, unit: str, signed: bool = True) -> str:
    """Both ends of an interval."""
    return f"{number(found.low, unit, signed)} to {number(found.high, unit, signed)}"


def about_gap(findings: Findings, gap: Gap) -> str:
    """Whether a difference was found, how large, and what could have been seen."""
    d, unit = gap.difference, findings.unit
    other, base = gap.pair.other.name, gap.pair.base.name
    level = percent(gap.confidence)
    if gap.together > 1:
        level += f" for all {gap.together} differences together"
    measured = f"{number(d.mean, unit, signed=True)} {unit} ({level}: {interval(d, unit)}; {d.count} seeds)"
    if d.low == d.high:
        return _without_scatter(findings, gap)
    seen = f"{d.count} seeds could have seen {number(d.detectable, unit)} with a chance of {percent(POWER)}"
    if gap.typical is not None:
        seen += f". In the typical seed: {about_typical(gap.typical, unit)}"
    if d.is_found:
        what = "better" if d.mean * findings.sign > 0 else "worse"
        return f"{other} is {what} than {base} here: {measured}; {seen}."
    return (
        f"No difference between {other} and {base} was found: {measured}. One larger than "
        f"{number(d.largest, unit)} {unit} is unlikely; {seen}."
    )


def about_typical(found: Typical, unit: str) -> str:
    """The difference of the typical seed, its interval, and what could have been seen."""
    measured = f"{number(found.middle, unit, signed=True)} {unit} ({interval(found, unit)})"
    if math.isnan(found.detectable):
        return f"{measured}; too many seeds are equal to tell what could have been seen"
    return f"{measured}; {number(found.detectable, unit)} could have been seen"


def _without_scatter(findings: Findings, gap: Gap) -> str:
    d, unit = gap.difference, findings.unit
    names = f"{gap.pair.other.name} minus {gap.pair.base.name}"
    return f"{names}: {number(d.mean, unit, signed=True)} {unit} in every one of {d.count} pairs."


def verdict(findings: Findings, gap: Gap) -> str:
    """The same in short."""
    d, unit = gap.difference, findings.unit
    if d.low == d.high:
        return _without_scatter(findings, gap)
    other, base = gap.pair.other.name, gap.pair.base.name
    if d.is_found:
        what = "better" if d.mean * findings.sign > 0 else "worse"
        return f"{other} is {what} than {base} here by {number(abs(d.mean), unit)} {unit} ({interval(d, unit)})."
    return (
        f"No difference between {other} and {base} was found; one larger than {number(d.largest, unit)} {unit} is "
        "unlikely."
    )


def about_learning_rates(findings: Findings) -> Iterator[str]:
    """How much the learning rate matters to each method, and choices at the end of what was tried."""
    unit = findings.unit
    for one in findings.standings:
        means = {rate: mean for rate in one.sweep if (mean := sweep_mean(one, rate)) is not None}
        if not means:
            continue
        worst = min(means, key=lambda rate: findings.sign * means[rate])
        gone = len(one.sweep) - len(means)
        text = (
            f"{one.contestant.name}: best at {one.chosen.learning_rate:g} with "
            f"{number(means[one.chosen.learning_rate], unit)} {unit} on the evaluation data, worst at {worst:g} with "
            f"{number(means[worst], unit)}"
        )
        text += f"; diverged at {gone} of {len(one.sweep)} rates" if gone else ""
        if one.chosen.at_edge:
            text += f"; the chosen rate is the {one.chosen.at_edge} that was tried, a better one may lie beyond it"
        yield text + "."


def about_edges(findings: Findings) -> str:
    """Who was given the lowest or the highest rate that was tried; "" if nobody was."""
    ends = [f"{one.contestant.name} the {one.chosen.at_edge}" for one in findings.standings if one.chosen.at_edge]
    if not ends:
        return ""
    who = ", ".join(ends)
    return f"Best at an end of the learning rates that were tried, so that a better one may lie beyond: {who}."


def about_replaced(findings: Findings) -> str:
    """Test runs that were done before more learning rates were tried; "" if there are none."""
    if not findings.replaced:
        return ""
    told = ", ".join(f"{count} of {one.name} at {rate:g}" for (one, rate), count in findings.replaced.items())
    return f"Learning rates were added after scores were seen; left out are the test runs before: {told}."


def sweep_mean(one: Standing, rate: float) -> float | None:
    """Mean score on evaluation data at a learning rate; None if a run diverged."""
    values = [value for value in one.sweep[rate] if value is not None]
    return statistics.fmean(values) if values and len(values) == len(one.sweep[rate]) else None


def about_ranks(findings: Findings) -> Iterator[str]:
    """How much the rank matters to each method."""
    unit = findings.unit
    for one in findings.rank_spreads:
        name = RANKED[one.method]
        ranks = ", ".join(map(str, one.ranks))
        yield (
            f"{name}: over the ranks {ranks} the best and the worst test score of a seed lie "
            f"{number(one.spread.mean, unit)} {unit} apart ({interval(one.spread, unit, signed=False)})."
        )
    d = findings.rank_difference
    if d is not None:
        verdict = "No difference in sensitivity to rank was found"
        if d.is_found:
            verdict = f"DoRA is {'less' if d.mean < 0 else 'more'} sensitive to the rank here"
        yield (
            f"{verdict}: DoRA's spread minus LoRA's is {number(d.mean, unit, signed=True)} {unit} "
            f"({interval(d, unit)}; {d.count} seeds could have seen {number(d.detectable, unit)})."
        )


def about_cost(findings: Findings) -> Iterator[str]:
    """Extra parameters."""
    for one in findings.standings:
        if one.sizes.get("magnitude") and one.sizes.get("direction"):
            yield (
                f"{one.contestant.name} has {one.sizes['magnitude']:,} magnitudes besides "
                f"{one.sizes['direction']:,} parameters of A and B: {percent(one.extra_over_lora, 2)} more than LoRA "
                f"of that rank, {percent(one.extra_over_model, 3)} of the model."
            )


def lead(findings: Findings) -> str:
    """The differences, for the top of the page."""
    shown = [gap for gap in findings.gaps if gap.pair.is_claim] or findings.gaps
    told = [verdict(findings, gap) for gap in shown]
    if len(told) > 3:
        told = [_summary(findings, shown)]
    told = told or ["There are too few runs for a difference."]
    return " ".join(filter(None, [*told, about_edges(findings), about_replaced(findings)]))


def _summary(findings: Findings, gaps: Sequence[Gap]) -> str:
    found = [gap for gap in gaps if gap.difference.is_found]
    better = sum(gap.difference.mean * findings.sign > 0 for gap in found)
    what = f"{len(found)} of {len(gaps)} differences were found, {better} of them for the better"
    if not found:
        what = f"None of {len(gaps)} differences was found"
    largest = number(max(gap.difference.largest for gap in gaps), findings.unit)
    return f"{what}; the largest that any interval leaves possible is {largest} {findings.unit}."
