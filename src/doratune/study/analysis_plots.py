"""The plots of an analysis: the paper's scatter, correlations against the paper's, where and how weights changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from doratune.extras import require
from doratune.study.analysis import Point, Run
from doratune.study.correlation import CONFIDENCE, Correlation
from doratune.study.names import natural
from doratune.study.page import Plot
from doratune.study.plots import (
    GROUND,
    INK,
    MARKERS,
    MUTED,
    Tip,
    legend_outside,
    log_scale,
    new_figure,
    ordered_colours,
    style,
    unordered_colours,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RANKS = (*range(1, 9), *range(10, 17, 2), *range(20, 33, 4), *range(40, 65, 8))
"""Singular values that are drawn; the numbers beside the page hold all."""
LEAST = 1e-3
"""Shares of the largest singular value below which nothing is drawn."""
SHOWN_SHAPES = 12
"""Layers up to which each has a shape of its own; more share one with their neighbours."""


def shapes_of(layers: Sequence[str]) -> dict[str, str]:
    """A marker for each layer, top to bottom of the model."""
    ordered = sorted(dict.fromkeys(layers), key=natural)
    count, markers = min(SHOWN_SHAPES, len(ordered)), list(MARKERS)
    return {layer: markers[index * count // len(ordered)] for index, layer in enumerate(ordered)}


def shapes_told(layers: Sequence[str]) -> str:
    """Which shape is which layer, in words."""
    found: dict[str, list[str]] = {}
    for layer, marker in shapes_of(layers).items():
        found.setdefault(marker, []).append(layer.rpartition(".")[2])
    return ", ".join(
        f"{MARKERS[marker]} {own[0]}" + (f" to {own[-1]}" if own[1:] else "") for marker, own in found.items()
    )


def scatter(run: Run, kind: str, correlation: Correlation, name: str, title: str) -> Plot:
    """delta D against delta M of one kind of weight: coloured by checkpoint, shaped by layer, with the line."""
    with style():
        figure, axes = new_figure(4.0, 3.5)
        tips = _draw_scatter(axes, run, kind, correlation)
        axes.set_title(f"{title}, r = {number(correlation.value)}")
        if len(run.checkpoints) > 1:
            legend_outside(figure, axes)
    return Plot(name, figure, _caption(correlation), tips)


def _draw_scatter(axes: Axes, run: Run, kind: str, correlation: Correlation) -> dict[str, list[Tip]]:
    """The points, the line, and what a legend needs; returns the points' tips."""
    points = [point for point in run.changed if point.kind == kind]
    shapes, colours = shapes_of([p.layer or "" for p in points]), ordered_colours(len(run.checkpoints))
    if correlation.slope is not None and correlation.intercept is not None:
        ends = [min(p.change.magnitude for p in points), max(p.change.magnitude for p in points)]
        line = [correlation.intercept + correlation.slope * x for x in ends]
        axes.plot(ends, line, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    tips: dict[str, list[Tip]] = {}
    for marker in dict.fromkeys(shapes.values()):
        own = [point for point in points if shapes[point.layer or ""] == marker]
        gid = f"shape-{len(tips)}"
        tips[gid] = [Tip(_told(run, point), point.layer or "") for point in own]
        x, y = [p.change.magnitude for p in own], [p.change.direction for p in own]
        fill = [colours[p.checkpoint] for p in own]
        axes.scatter(x, y, s=34, marker=marker, c=fill, edgecolors=GROUND, linewidths=0.5, gid=gid)
    for label, colour in zip(run.checkpoints, colours, strict=True):
        axes.plot([], [], "o", color=colour, markersize=5, label=label)
    axes.set_xlabel("ΔM")
    axes.set_ylabel("ΔD")
    axes.margins(0.08)
    return tips


def correlations(runs: Sequence[Run], found: Mapping[str, Mapping[str, Correlation]]) -> Plot:
    """Correlation of every kind and run with its interval, and the paper's values."""
    kinds = list(dict.fromkeys(kind for each in found.values() for kind in each))
    rows = [(kind, run) for kind in kinds for run in runs if kind in found[run.label]]
    colours = unordered_colours(len(runs))
    tips: dict[str, list[Tip]] = {}
    with style():
        figure, axes = new_figure(5.8, 1.2 + 0.2 * len(rows) + 0.1 * len(kinds))
        y, ticks = 0.0, []
        for kind in kinds:
            start = y
            for index, run in enumerate(runs):
                c = found[run.label].get(kind)
                if c is None or c.value is None:
                    continue
                colour = colours[index]
                if c.low is not None and c.high is not None:
                    axes.plot([c.low, c.high], [y, y], color=colour, linewidth=2.6, alpha=0.45, solid_capstyle="round")
                gid = f"r-{len(tips)}"
                tips[gid] = [Tip(f"{run.label}, {kind}\nr = {number(c.value)} {interval(c)}\n{_counted(c)}")]
                axes.scatter([c.value], [y], s=38, color=colour, zorder=3, gid=gid)
                y -= 1
            ticks.append(((start + y + 1) / 2, kind))
            y -= 0.5
        for index, run in enumerate(runs):
            colour = colours[index]
            axes.plot([], [], "o-", color=colour, markersize=5, linewidth=2.6, label=run.label)
            axes.axvline(run.paper, color=colour, linewidth=1, linestyle=":", zorder=0)
            paper = f"paper {number(run.paper)}"
            axes.text(run.paper, 1.2, paper, color=colour, fontsize=7.5, ha="center", va="bottom")
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set_yticks([at for at, _ in ticks], [kind for _, kind in ticks])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_xlim(-1.05, 1.05)
        axes.set_ylim(y + 0.7, 0.9)
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("correlation of ΔD with ΔM")
        legend_outside(figure, axes)
    about = (
        f"Bars: {CONFIDENCE:.0%} intervals, bootstrapped over layers. Dotted: what the paper found on VL-BART "
        "(query and value, 6 layers, 4 checkpoints) with the method of that colour."
    )
    return Plot("correlations", figure, about, tips, wide=True)


def over_depth(run: Run, name: str, title: str, quantity: str, log: bool) -> Plot:
    """One quantity of each weight at the last checkpoint, layer by layer, a line for each kind."""
    last = [p for p in run.last() if p.layer is not None and p.change.size > 0]
    layers = sorted({p.layer or "" for p in last}, key=natural)
    numbers = {layer: tail for layer in layers if (tail := layer.rpartition(".")[2]).isdecimal()}
    if len(set(numbers.values())) == len(layers):  # an adapter may begin in the middle of the model
        at = {layer: int(tail) for layer, tail in numbers.items()}
    else:
        at = {layer: index for index, layer in enumerate(layers)}
    kinds = list(dict.fromkeys(p.kind for p in last))
    colours = unordered_colours(len(kinds))
    tips: dict[str, list[Tip]] = {}
    zeros = 0
    with style():
        figure, axes = new_figure(4.0, 3.5)
        for index, kind in enumerate(kinds):
            own = sorted((p for p in last if p.kind == kind), key=lambda p: at[p.layer or ""])
            values = [quantity_of(p, quantity) for p in own]
            shown = [(p, v) for p, v in zip(own, values, strict=True) if v is not None and (v > 0 or not log)]
            zeros += sum(v is not None for v in values) - len(shown)
            if not shown:
                continue
            colour, marker = colours[index], list(MARKERS)[colours[:index].count(colours[index]) % len(MARKERS)]
            x, y = [at[p.layer or ""] for p, _ in shown], [value for _, value in shown]
            axes.plot(x, y, color=colour, linewidth=1, alpha=0.6)
            gid = f"kind-{index}"
            axes.scatter(x, y, s=16, color=colour, marker=marker, gid=gid)
            axes.plot([], [], color=colour, marker=marker, markersize=4, linewidth=1, label=kind)
            tips[gid] = [Tip(_told(run, p), p.layer or "") for p, _ in shown]
        if log and tips:
            log_scale(axes)
        elif quantity == "intruders":
            axes.set_ylim(-0.3, max(4, axes.get_ylim()[1]) + 0.3)
            axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("layer")
        axes.set_title(title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        legend_outside(figure, axes, columns=3)
    caption = f"Not drawn, as a logarithmic axis has no 0: {zeros} of the weights." if zeros else ""
    return Plot(name, figure, caption, tips)


def spectra(run: Run, name: str) -> Plot:
    """Singular values of each change, a line for each weight, as shares of its largest."""
    found = [(p, p.layer, p.change.spectrum.values) for p in run.last() if p.layer is not None and p.change.spectrum]
    drawn = [(point, layer, values) for point, layer, values in found if values[0]]
    named = list(dict.fromkeys(point.kind for point, _, _ in drawn))
    kinds = dict(zip(named, unordered_colours(len(named)), strict=True))
    tips: dict[str, list[Tip]] = {}
    with style():
        figure, axes = new_figure(4.0, 3.5)
        lines, fill, told = [], [], []
        for point, layer, values in drawn:
            fill.append(kinds[point.kind])
            shares = [v / values[0] for v in values]
            lines.append([(n, shares[n - 1]) for n in RANKS if n <= len(shares) and shares[n - 1] > LEAST])
            told.append(Tip(_told(run, point), layer))
        if lines:
            collections = require("matplotlib.collections", "study")
            axes.add_collection(
                collections.LineCollection(lines, colors=fill, linewidths=0.9, alpha=0.55, gid="weights")
            )
            axes.autoscale_view()
            tips["weights"] = told
        for kind, colour in kinds.items():
            axes.plot([], [], color=colour, label=kind)
        log_scale(axes)
        axes.set_ylim(LEAST, 1.4)
        axes.set_xlabel("singular value")
        axes.set_ylabel("share of the largest")
        axes.set_title("Singular values of the change")
        legend_outside(figure, axes, columns=3)
    return Plot(name, figure, "", tips)


def quantity_of(point: Point, name: str) -> float | None:
    """A number of a point by its name: a field of its change or of its spectrum."""
    change = point.change
    value = getattr(change, name) if hasattr(change, name) else getattr(change.spectrum, name, None)
    return None if value is None else float(value)


def number(value: float | None) -> str:
    """A correlation as text."""
    return "–" if value is None else f"{value:+.2f}".replace("-", "−")


def interval(c: Correlation) -> str:
    """Its interval as text."""
    return "" if c.low is None or c.high is None else f"[{number(c.low)}, {number(c.high)}]"


def _counted(c: Correlation) -> str:
    return f"{c.points} points, {c.layers} layers"


def _caption(c: Correlation) -> str:
    if c.low is None:
        return f"{_counted(c)}: too few for an interval."
    return f"{CONFIDENCE:.0%} interval {interval(c)}; {_counted(c)}."


def _told(run: Run, point: Point) -> str:
    change = point.change
    lines = [
        point.path,
        run.checkpoints[point.checkpoint],
        f"ΔM {change.magnitude:.3g} ({change.relative_magnitude:.2%} of |w|)",
        f"ΔD {change.direction:.3g}",
        f"{change.magnitude_share:.0%} of the change is magnitude",
    ]
    if change.spectrum is not None:
        lines.append(f"effective rank {change.spectrum.effective_rank:.1f}, {change.spectrum.intruders} intruders")
    return "\n".join(lines)
