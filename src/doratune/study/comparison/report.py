"""The page of a comparison."""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path

from doratune import __version__
from doratune.study.comparison import figures, sentences
from doratune.study.comparison.contestants import RANKED, UNRANKED
from doratune.study.comparison.findings import Findings, Standing
from doratune.study.comparison.recipe import Comparison
from doratune.study.page import Column, Page, Plot, Section, Table, Text

COVERED = (
    "Every pair shares seed, order of the data and start of the head. Intervals are Student's t over seeds, those of "
    "the typical seed Wilcoxon's: they cover what changes from seed to seed with the chosen learning rates on these "
    "test data, not what other data or rates would show."
)


def write_report(findings: Findings, folder: Path) -> Path:
    """Write the page with its pictures and numbers, and return where it is.

    Raises:
        AdapterError: if the folder holds something else than a report, or cannot be written.
    """
    return make_page(findings).write(folder, findings.as_json())


def make_page(findings: Findings) -> Page:
    """The page."""
    train, grid = findings.comparison.train, findings.comparison.grid
    steps = f"{train.steps} steps" if train.steps else f"{train.epochs:g} epochs"
    page = Page(
        title=f"Compared: {_names(findings.comparison)}",
        lead=sentences.lead(findings),
        facts=[
            ("task", train.task),
            ("model", Path(train.model).name),
            ("data", ", ".join(Path(name).name for name in train.data)),
            ("training", f"{steps}, batches of {train.batch_size * train.gradient_accumulation}"),
            ("test data", f"{findings.test_examples:,}"),
            ("seeds", str(grid.seeds)),
            ("runs", str(findings.runs)),
        ],
        findings=_cards(findings),
        footer=f"doratune {__version__}, Python {platform.python_version()}, {findings.device}. {COVERED}",
    )
    _differences(page.section("Differences", COVERED), findings)
    _scores(page.section("Scores"), findings)
    if any(one.sweep for one in findings.standings):
        _learning_rates(
            page.section("Learning rates", "Chosen on evaluation data, for each method by itself."), findings
        )
    if findings.rank_spreads:
        _ranks(page.section("Ranks"), findings)
    _costs(page.section("Parameters, time and memory"), findings)
    page.section("Runs").add(_runs(findings))
    if findings.problems:
        page.section("Runs that diverged").add(Text("Which, and why", findings.problems))
    return page


def _names(comparison: Comparison) -> str:
    """Everybody, or of many the methods and their ranks."""
    everybody = comparison.contestants
    if len(everybody) <= 4:
        return ", ".join(one.name for one in everybody)
    methods = dict.fromkeys({**RANKED, **UNRANKED}[one.method] for one in everybody)
    ranks = [one.rank for one in everybody if one.rank is not None]
    return ", ".join(methods) + (f" at ranks {min(ranks)} to {max(ranks)}" if ranks else "")


def _cards(findings: Findings) -> list[tuple[str, str, str]]:
    unit = findings.unit
    cards = [
        (
            gap.pair.name,
            sentences.number(gap.difference.mean, unit, signed=True),
            f"{unit}; {sentences.interval(gap.difference, unit)}",
        )
        for gap in findings.gaps
        if gap.pair.is_claim
    ]
    return cards[:6]


def _differences(section: Section, findings: Findings) -> None:
    if not findings.gaps:
        section.add(Text("Too few runs came to an end for a difference."))
        return
    figure, tips = figures.differences(findings)
    caption = (
        "Mean of the paired differences and interval; below it, hollow, that of the typical seed. The grey bar is what "
        "so many seeds could not have seen in the mean: true differences inside it are missed in more than 20 of 100 "
        "such studies."
    )
    section.add(*(Text(sentences.about_gap(findings, gap)) for gap in findings.gaps))
    section.add(Plot("differences", figure, caption, tips, wide=True))
    digits = sentences.digits(findings.unit)
    columns = [Column("difference"), *(Column(n, f"+{digits}") for n in ("mean", "low", "high"))]
    columns += [Column("could be seen", digits, "with a chance of 80 %")]
    columns += [Column(f"typical {n}".strip(), f"+{digits}") for n in ("", "low", "high")]
    columns += [
        Column("typical could be seen", digits, "with a chance of 80 %"),
        Column("seeds", "d"),
        Column("confidence"),
    ]
    rows = []
    for gap in findings.gaps:
        d = gap.difference
        level = f"{sentences.percent(gap.confidence)} for {gap.together} together"
        few = (None, None, None, None)
        typical = few if gap.typical is None else dataclasses.astuple(gap.typical)
        rows.append([gap.pair.name, d.mean, d.low, d.high, d.detectable, *typical, d.count, level])
    caption = (
        f"In {findings.unit}. Typical: what one run that collapses hardly moves (Hodges-Lehmann estimate, interval of "
        "Wilcoxon's signed-rank test); none for too few seeds."
    )
    section.add(Table("differences-table", columns, rows, caption))


def _scores(section: Section, findings: Findings) -> None:
    figure, tips = figures.scores(findings)
    level = sentences.percent(findings.comparison.grid.confidence)
    section.add(
        Plot("scores", figure, f"Each mark is a seed; the line is the mean's {level} interval.", tips, wide=True)
    )
    digits = sentences.digits(findings.unit)
    columns = [Column("method"), Column("learning rate", "g"), *(Column(n, digits) for n in ("mean", "low", "high"))]
    rows = []
    for one in findings.standings:
        ends = (None, None, None) if one.score is None else (one.score.mean, one.score.low, one.score.high)
        rows.append([one.contestant.name, one.chosen.learning_rate, *ends, len(one.scores), one.diverged])
    columns += [Column("seeds", "d"), Column("diverged", "d")]
    section.add(Table("scores-table", columns, rows, f"On test data, with {level} intervals."))
    seeds = sorted({seed for one in findings.standings for seed in one.scores})
    by_seed = [[seed, *(one.scores.get(seed) for one in findings.standings)] for seed in seeds]
    names = [Column("seed", "d"), *(Column(one.contestant.name, digits) for one in findings.standings)]
    groups = [f"seed-{seed}" for seed in seeds]
    section.add(Table("seeds", names, by_seed, "Every test score.", groups=groups))


def _learning_rates(section: Section, findings: Findings) -> None:
    figure, tips = figures.learning_rates(findings)
    seeds = findings.comparison.grid.sweep_seeds
    mean = "One seed" if seeds == 1 else f"Mean of {seeds} seeds"
    section.add(*(Text(line) for line in sentences.about_learning_rates(findings)))
    section.add(Plot("learning-rates", figure, f"{mean}; the chosen rate is ringed.", tips))
    digits = sentences.digits(findings.unit)
    rows = [
        [
            one.contestant.name,
            rate,
            sentences.sweep_mean(one, rate),
            "chosen" if rate == one.chosen.learning_rate else "",
        ]
        for one in findings.standings
        for rate in one.sweep
    ]
    columns = [Column("method"), Column("learning rate", "g"), Column("evaluation score", digits), Column("choice")]
    section.add(Table("sweep", columns, rows, "No score: a run diverged."))


def _ranks(section: Section, findings: Findings) -> None:
    figure, tips = figures.ranks(findings)
    section.add(*(Text(line) for line in sentences.about_ranks(findings)))
    section.add(Plot("ranks", figure, "Mean over seeds, and its interval.", tips))


def _costs(section: Section, findings: Findings) -> None:
    section.add(*(Text(line) for line in sentences.about_cost(findings)))
    columns = [
        Column("method"),
        Column("trained", ",d"),
        Column("magnitudes", ",d"),
        Column("on LoRA, %", ".2f", "what magnitudes add to A and B"),
        Column("on the model, %", ".3f", "what magnitudes add to the base"),
        Column("ms/step", ".0f"),
        Column("x the first", ".2f", "median over seeds of the ratio to the first method"),
        Column("low", ".2f"),
        Column("high", ".2f"),
        Column("peak MiB", ".0f"),
    ]
    memory = "the peak of a run's own process, libraries and data included"
    if findings.device.startswith("cuda"):
        memory = "the peak of what a run's tensors took on the GPU"
    caption = (
        "Time is the median over test runs, its ratio that of runs of one seed with a 95 % interval (below six seeds: "
        f"lowest and highest); memory is {memory}. Runs share the machine with whatever else it does, and those of one "
        "seed may have run on different ones: doratune bench measures language models by themselves."
    )
    section.add(Table("costs", columns, [_cost(one) for one in findings.standings if one.sizes], caption))


def _runs(findings: Findings) -> Table:
    numbers = [Column("learning rate", "g"), Column("seed", "d"), Column("score", ".4f"), Column("loss", ".4f")]
    columns = [Column("for"), Column("method"), *numbers, Column("seconds", ".1f"), Column("peak MiB", ".0f")]
    rows = []
    for outcome in findings.outcomes:
        trial, result = outcome.trial, outcome.result or {}
        loss = result.get("test_loss" if trial.stage == "test" else "loss_after")
        memory = result["peak_memory"] / 2**20 if result else None
        score = outcome.score(findings.comparison.by_accuracy)
        name = [trial.stage, trial.contestant, trial.learning_rate, trial.seed]
        rows.append([*name, score, loss, result.get("seconds"), memory])
    caption = "Runs for the sweep are measured on evaluation data, for the test on test data; none: diverged."
    return Table("runs", columns, rows, caption, searchable=True)


def _cost(one: Standing) -> list[object]:
    sizes, adapter = one.sizes, bool(one.sizes["direction"] and one.sizes["magnitude"])
    return [
        one.contestant.name,
        sizes["trained"],
        sizes["magnitude"] or None,
        100 * one.extra_over_lora if adapter else None,
        100 * one.extra_over_model if sizes["magnitude"] else None,
        1e3 * one.step_seconds,
        *(one.step_ratio or (None, None, None)),
        one.peak_memory / 2**20,
    ]
