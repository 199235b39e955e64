"""The page of an analysis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import doratune
from doratune.study import analysis_plots as plots
from doratune.study.analysis import OVERALL, Analysis, Run
from doratune.study.correlation import CONFIDENCE, FEWEST_POINTS, Correlation
from doratune.study.names import layer_of
from doratune.study.page import Column, Heading, Item, Page, Table, Text
from doratune.study.spectrum import COMPARED, EXACT, LOOKED_AT, SIMILAR

PATTERN = (
    "Each mark is one weight at one checkpoint. ΔM is how much the lengths of its rows changed, mean |m′ − m|; ΔD is "
    "how much their directions changed, mean (1 − cos). A positive correlation means that weights change both or "
    "neither; a negative one that those which turn more change length less. Both grow while a model trains, which "
    "pulls r up where checkpoints are pooled, as they are here and in the paper. Intervals are bootstrapped over "
    "layers, because checkpoints of one run are not independent. Rest the mouse on a mark: its layer lights up "
    "everywhere."
)
DEPTH = "At the last checkpoint of each run, layer by layer."
SPECTRUM = (
    "Effective rank is exp(entropy) of the change's singular values: a LoRA of rank 16 cannot exceed 16. Intruders "
    f"are, among the {LOOKED_AT} leading singular vectors of the changed weight, those that have a cosine below "
    f"{SIMILAR:g} with every singular vector of the base: directions that the base did not have."
)
APPROXIMATE = (
    f"Weights whose smaller side is above {EXACT} are approximated: effective ranks of changes that are not low-rank "
    f"are upper bounds, and intruders are those unlike the base's {COMPARED} leading vectors."
)


def page_of(analysis: Analysis, command: str = "") -> Page:
    """Put an analysis into a page, ready to be written."""
    runs = analysis.runs
    found = {run.label: run.correlations() for run in runs}
    page = Page(
        title="How training moved the weights",
        lead="\n".join(sentence(run, _main(found[run.label])) for run in runs),
        facts=_facts(analysis),
        findings=[_finding(run, c) for run in runs if (c := _main(found[run.label])) is not None],
        footer=f"doratune {doratune.__version__}" + (f" · {command}" if command else ""),
    )
    _pattern(page, runs, found)
    _depth(page, runs)
    _spectra(page, runs)
    section = page.section("Every weight", "At the last checkpoint of each run.")
    section.add(_weights(runs))
    _left_out(page, runs)
    return page


def sentence(run: Run, c: Correlation | None) -> str:
    """What one run's overall correlation lets one say, honestly; None: there is none."""
    if run.is_unchanged:
        return f"{run.label}: nothing changed, {len(run.last())} weights are as in the base."
    if c is None or c.points < FEWEST_POINTS:
        return f"{run.label}: no correlation, as there are too few weights that changed."
    if c.value is None:
        return f"{run.label}: no correlation, as ΔM or ΔD is the same for all weights of a kind."
    told = {
        "positive": "weights that turn more change length more",
        "negative": "weights that turn more change length less",
        "undecided": "the interval holds 0, so neither sign is shown",
        "too few layers to tell": "too few layers for an interval",
    }[c.sign]
    return f"{run.label}: r = {plots.number(c.value)} {plots.interval(c)}".rstrip() + f", {told}."


def _main(found: dict[str, Correlation]) -> Correlation | None:
    return found.get(OVERALL) or next(iter(found.values()), None)


def _facts(analysis: Analysis) -> list[tuple[str, str]]:
    facts = [("base", analysis.base)]
    for run in analysis.runs:
        steps = run.checkpoints[0] if len(run.checkpoints) == 1 else f"{len(run.checkpoints)} checkpoints"
        weights = len({point.path for point in run.points})
        told = [*([] if run.method_name == run.label else [run.method_name]), steps, f"{weights} weights"]
        facts.append((run.label, ", ".join(told)))
    return facts


def _finding(run: Run, c: Correlation) -> tuple[str, str, str]:
    end = run.correlation(None if len(run.kinds) > 1 else run.kinds[0], len(run.checkpoints) - 1)
    beside = [
        plots.interval(c),
        f"last checkpoint alone {plots.number(end.value)}" if len(run.checkpoints) > 1 else "",
        f"paper {plots.number(run.paper)}",
    ]
    return f"{run.label}: r", plots.number(c.value), "\n".join(part for part in beside if part)


def _pattern(page: Page, runs: Sequence[Run], found: dict[str, dict[str, Correlation]]) -> None:
    layers = [point.layer or "" for run in runs for point in run.changed]
    told = f" Colour is the checkpoint, shape the layer: {plots.shapes_told(layers)}." if layers else ""
    section = page.section("Magnitude against direction", PATTERN + told)
    if any(found.values()):
        section.add(plots.correlations(runs, found))
        section.add(_correlations(runs, found))
    kinds = list(dict.fromkeys(kind for run in runs for kind in run.kinds))
    for index, kind in enumerate(kinds):
        if len(runs) > 1:
            section.add(Heading(kind))
        for number, run in enumerate(runs):
            if kind in run.kinds:
                title = run.label if len(runs) > 1 else kind
                section.add(plots.scatter(run, kind, found[run.label][kind], f"scatter-{index}-{number}", title))


def _correlations(runs: Sequence[Run], found: dict[str, dict[str, Correlation]]) -> Table:
    columns = [
        Column("run"),
        Column("weights"),
        Column("r", "+.2f", "Pearson's correlation of ΔD with ΔM over layers and checkpoints"),
        Column("from", "+.2f", f"{CONFIDENCE:.0%} interval, bootstrapped over layers"),
        Column("to", "+.2f"),
        Column("sign", "", "what the interval lets one say"),
        Column("r at the end", "+.2f", "over the layers at the last checkpoint alone"),
        Column("paper", "+.2f", "VL-BART, query and value"),
        Column("slope", ".3g", "of the regression line of ΔD on ΔM; over all kinds in units of deviations"),
        Column("points", "d"),
        Column("layers", "d"),
    ]
    rows: list[list[Any]] = []
    for run in runs:
        for kind, c in found[run.label].items():
            end = run.correlation(None if kind == OVERALL else kind, len(run.checkpoints) - 1).value
            rows.append([run.label, kind, c.value, c.low, c.high, c.sign, end, run.paper, c.slope, c.points, c.layers])
    return Table(
        "correlations", columns, rows, "Over all kinds each weight counts by its distance from its kind's mean."
    )


def _depth(page: Page, runs: Sequence[Run]) -> None:
    section = page.section("Where the change is", DEPTH)
    shown = [
        ("direction", "Direction: ΔD", True),
        ("relative_magnitude", "Magnitude: ΔM per row norm", True),
        ("magnitude_share", "Share of the change that is magnitude", False),
    ]
    for number, run in enumerate(runs):
        if run.kinds:
            section.add(Heading(run.label))
            for quantity, title, log in shown:
                section.add(plots.over_depth(run, f"depth-{quantity.replace('_', '-')}-{number}", title, quantity, log))


def _spectra(page: Page, runs: Sequence[Run]) -> None:
    shown: list[Item] = []
    for number, run in enumerate(runs):
        spectra = [point.change.spectrum for point in run.last() if point.change.spectrum is not None]
        if not spectra:
            continue
        shown += [
            Heading(run.label),
            plots.spectra(run, f"spectra-{number}"),
            plots.over_depth(run, f"depth-rank-{number}", "Effective rank of the change", "effective_rank", log=False),
            plots.over_depth(run, f"depth-intruders-{number}", "Intruder dimensions", "intruders", log=False),
        ]
        if not all(spectrum.exact for spectrum in spectra):
            shown.append(Text(APPROXIMATE))
    if shown:
        page.section("What the change is made of", SPECTRUM).add(*shown)


def _weights(runs: Sequence[Run]) -> Table:
    columns = [
        Column("run"),
        Column("weight"),
        Column("kind"),
        Column("ΔM", ".2e", "mean |m′ − m|"),
        Column("of |w|", ".2%", "ΔM per mean row norm"),
        Column("ΔD", ".2e", "mean (1 − cos)"),
        Column("change", ".2%", "size of the change per size of the weight, in the Frobenius norm"),
        Column("magnitude", ".0%", "share of the squared change that is due to the rows' lengths"),
        Column("eff. rank", ".1f", "of the change"),
        Column("intruders", "d", f"of the {LOOKED_AT} leading singular vectors"),
    ]
    rows: list[list[Any]] = []
    groups = []
    for run in runs:
        for point in run.last():
            c, s = point.change, point.change.spectrum
            numbers = [c.magnitude, c.relative_magnitude, c.direction, c.relative_size, c.magnitude_share]
            ranks = [s.effective_rank, s.intruders] if s else [None, None]
            rows.append([run.label, point.path, point.kind, *numbers, *ranks])
            groups.append(layer_of(point.path)[0] or "")
    return Table("weights", columns, rows, "Click on a heading to sort.", searchable=True, groups=groups)


def _left_out(page: Page, runs: Sequence[Run]) -> None:
    section = page.section("Not compared", "Every other tensor of the base and the checkpoints, and why.")
    for run in runs:
        section.add(Heading(run.label))
        if not run.left_out:
            section.add(Text("Nothing was left out."))
        for reason, names in run.reasons.items():
            section.add(Text(f"{len(names)} × {reason}", names))
