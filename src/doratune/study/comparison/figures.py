"""Pictures of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from doratune.study.comparison import sentences
from doratune.study.comparison.findings import Findings, Standing
from doratune.study.comparison.statistics import mean_interval
from doratune.study.plots import (
    COLOURS,
    FAINT,
    INK,
    MARKERS,
    MUTED,
    Tip,
    Tips,
    legend_outside,
    new_figure,
    style,
    unordered_colours,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawn = tuple["Figure", Tips]


def looks(standings: Sequence[Standing]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each contestant: the same in every picture."""
    colours = unordered_colours(len(standings))
    return {
        one.contestant.key: (colour, tuple(MARKERS)[i % len(MARKERS)])
        for i, (one, colour) in enumerate(zip(standings, colours, strict=True))
    }


def scores(findings: Findings) -> Drawn:
    """Test scores: each seed a mark, and the mean with its interval."""
    shown = [one for one in findings.standings if one.score is not None]
    tips: dict[str, list[Tip]] = {}
    with style():
        figure, axes = new_figure(6.2, 0.9 + 0.42 * len(shown))
        for row, one in enumerate(shown):
            colour, marker = looks(findings.standings)[one.contestant.key]
            seeds = list(one.scores)
            spread = [row + 0.16 * (2 * i / max(1, len(seeds) - 1) - 1) for i in range(len(seeds))]
            gid = f"scores-{one.contestant.key}"
            axes.scatter(list(one.scores.values()), spread, s=16, color=colour, marker=marker, alpha=0.55, gid=gid)
            tips[gid] = [
                Tip(
                    f"{one.contestant.name}, seed {s}\n{sentences.number(v, findings.unit)} {findings.unit}",
                    f"seed-{s}",
                )
                for s, v in one.scores.items()
            ]
            assert one.score is not None
            _interval(axes, row + 0.34, one.score.mean, one.score.low, one.score.high, colour)
        _rows(axes, [one.contestant.name for one in shown])
        axes.set_xlabel(_score_label(findings, "test"))
    return figure, tips


def differences(findings: Findings) -> Drawn:
    """Paired differences with their intervals, and what could have been seen."""
    tips: dict[str, list[Tip]] = {}
    with style():
        figure, axes = new_figure(6.2, 1.05 + 0.42 * len(findings.gaps))
        axes.axvline(0, color=INK, linewidth=0.9)
        for row, gap in enumerate(findings.gaps):
            d = gap.difference
            axes.barh(row, 2 * d.detectable, left=-d.detectable, height=0.62, color=FAINT, alpha=0.6, zorder=0)
            colour = COLOURS[0] if gap.pair.is_claim else COLOURS[5]
            _interval(axes, row, d.mean, d.low, d.high, colour)
            gid = f"difference-{gap.pair.key}"
            axes.scatter([d.mean], [row], s=46, color=colour, gid=gid, zorder=5)
            if gap.typical is not None:
                ends, below = [gap.typical.low, gap.typical.high], row + 0.22
                axes.plot(ends, [below, below], color=colour, linewidth=1.1, solid_capstyle="butt", zorder=3)
                axes.scatter([gap.typical.middle], [below], s=18, color="white", edgecolors=colour, zorder=5)
            tips[gid] = [Tip(sentences.about_gap(findings, gap))]
        _rows(axes, [gap.pair.name for gap in findings.gaps])
        better = "right" if findings.sign > 0 else "left"
        axes.set_xlabel(f"difference in {findings.unit}; {better} of 0 the first of the two is better")
    return figure, tips


def learning_rates(findings: Findings) -> Drawn:
    """Scores on evaluation data over the learning rate; the chosen one is ringed."""
    tips: dict[str, list[Tip]] = {}
    with style():
        figure, axes = new_figure(4.2, 3.3)
        for one in findings.standings:
            means = {rate: mean for rate in one.sweep if (mean := sentences.sweep_mean(one, rate)) is not None}
            if not means:
                continue
            colour, marker = looks(findings.standings)[one.contestant.key]
            axes.plot(list(means), list(means.values()), color=colour, linewidth=1.3)
            gid = f"rates-{one.contestant.key}"
            name = one.contestant.name
            axes.scatter(list(means), list(means.values()), s=24, color=colour, marker=marker, label=name, gid=gid)
            best = one.chosen.learning_rate
            axes.scatter([best], [means[best]], s=90, facecolors="none", edgecolors=colour, linewidths=1.2)
            tips[gid] = [
                Tip(f"{name}, learning rate {rate:g}\n{sentences.number(mean, findings.unit)} {findings.unit}")
                for rate, mean in means.items()
            ]
        axes.set_xscale("log")
        tried = sorted({rate for one in findings.standings for rate in one.sweep})
        axes.set_xticks(tried, [f"{rate:g}" for rate in tried], rotation=30 if len(tried) > 5 else 0)
        axes.set_xticks([], minor=True)
        axes.set_xlabel("learning rate")
        axes.set_ylabel(_score_label(findings, "evaluation"))
        legend_outside(figure, axes, columns=2)
    return figure, tips


def ranks(findings: Findings) -> Drawn:
    """Test scores over the rank, one line a method."""
    tips: dict[str, list[Tip]] = {}
    level = findings.comparison.grid.confidence
    tried: set[int] = set()
    with style():
        figure, axes = new_figure(4.2, 3.3)
        for index, spread in enumerate(findings.rank_spreads):
            own = [one for one in findings.standings if one.contestant.method == spread.method and one.scores]
            own.sort(key=lambda one: one.contestant.rank or 0)
            found = [mean_interval(list(one.scores.values()), level) for one in own]
            x: list[Any] = [one.contestant.rank for one in own]
            colour, marker = COLOURS[index], tuple(MARKERS)[index]
            axes.fill_between(x, [e.low for e in found], [e.high for e in found], color=colour, alpha=0.15, linewidth=0)
            axes.plot(x, [e.mean for e in found], color=colour, linewidth=1.4)
            gid, name = f"ranks-{spread.method}", own[0].contestant.name.split()[0]
            axes.scatter(x, [e.mean for e in found], s=24, color=colour, marker=marker, label=name, gid=gid)
            tips[gid] = [
                Tip(f"{one.contestant.name}\n{sentences.number(e.mean, findings.unit)} {findings.unit}")
                for one, e in zip(own, found, strict=True)
            ]
            tried |= set(x)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(tried), [str(rank) for rank in sorted(tried)])
        axes.set_xlabel("rank")
        axes.set_ylabel(_score_label(findings, "test"))
        legend_outside(figure, axes)
    return figure, tips


def _interval(axes: Any, y: float, mean: float, low: float, high: float, colour: str) -> None:
    axes.plot([low, high], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt", zorder=3)
    axes.plot([mean, mean], [y - 0.11, y + 0.11], color=INK, linewidth=1.6, zorder=4)


def _rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(len(names) - 0.35, -0.55)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)


def _score_label(findings: Findings, data: str) -> str:
    return f"{data} accuracy in %" if findings.unit == "points" else f"{data} loss in nats"
