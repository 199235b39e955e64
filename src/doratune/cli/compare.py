"""``doratune compare``: is DoRA better than LoRA for a task of the user's?"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich import progress
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from doratune.cli.common import at_least, check, say
from doratune.errors import Interrupted
from doratune.study.page import folder_problem, without_nan
from doratune.train.quiet import quiet_libraries

if TYPE_CHECKING:
    from doratune.study.comparison.findings import Findings
    from doratune.study.comparison.recipe import Comparison
    from doratune.study.comparison.trials import Outcome, Trial


@dataclass
class Compare:
    """Compare methods on one task: each with a learning rate of its own, many seeds, and intervals.

    A recipe of doratune train with a table [compare]. Runs go into an Optuna study; the same command goes on with it,
    on as many machines as share its storage, and with more --seeds adds to it. Writes a report.
    """

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """TOML file: options of doratune train, and a table [compare] with methods, ranks, learning_rates, seeds."""
    output: Path = Path("runs/compare")
    """Folder for the study and its report."""
    workers: int = 1
    """Training runs at a time; of several GPUs each has its own."""
    seeds: int | None = None
    """Runs of each method with its chosen learning rate; none: as the recipe says."""
    storage: str | None = None
    """URL of an Optuna storage, such as postgresql+psycopg://host/name, for many machines; none: study.db in the
    output folder."""
    study: str = "compare"
    """Name of the study within the storage."""
    json: bool = False
    """Print what was found as JSON."""

    def problems(self) -> Iterator[str]:
        """Options that cannot work."""
        yield from at_least(self, workers=1)
        problem = folder_problem(self.output / "report")
        if problem:
            yield problem


def run(options: Compare) -> int:
    """Check, do what is missing, report."""
    from doratune.study.comparison import recipe

    comparison = recipe.load(options.recipe, options.seeds)
    check([*options.problems(), *_of_runs(comparison, options.output)])
    quiet_libraries()
    from doratune.study.comparison.findings import find
    from doratune.study.comparison.report import write_report
    from doratune.study.comparison.run import run_all
    from doratune.study.comparison.storage import database, open_study

    options.output.mkdir(parents=True, exist_ok=True)
    url = options.storage or database(options.output / "study.db")
    study = functools.partial(open_study, url, options.study, comparison)
    errors = Console(stderr=True, emoji=False)
    with _Progress(comparison, errors) as bar:
        try:
            outcomes = run_all(comparison, study, options.output, options.workers, bar.watch)
        except KeyboardInterrupt:
            say(errors, f"Interrupted; {max(0, bar.over)} runs are kept. The same command goes on.")
            raise Interrupted from None
    findings = find(comparison, outcomes)
    page = write_report(findings, options.output / "report")
    if options.json:
        print(json.dumps(without_nan(findings.as_json())))
    else:
        _print(findings, page)
    return 0


def _of_runs(comparison: Comparison, output: Path) -> list[str]:
    """What can be found wrong with the runs before any is started; most of it is the same for all."""
    from doratune.study.comparison.run import RUNS
    from doratune.train.run import problems

    runs = (
        comparison.config(one, comparison.grid.rates(one)[0], 0, output / RUNS / one.key)
        for one in comparison.contestants
    )
    return list(dict.fromkeys(problem for config in runs for problem in problems(config)))


class _Progress:
    """A bar over all runs; where there is no terminal, a line for each."""

    def __init__(self, comparison: Comparison, console: Console) -> None:
        self.comparison, self.console = comparison, console
        self.bar = progress.Progress(
            progress.TextColumn("{task.fields[told]}", markup=False),
            progress.BarColumn(bar_width=None),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("runs", total=None, told="")
        self.over = -1
        self.told: set[Trial] = set()
        """Runs of which a line was said."""

    def __enter__(self) -> _Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def watch(self, over: list[Outcome], count: int, running: int) -> None:
        if len(over) == self.over:
            return
        from doratune.study.comparison.findings import name_of
        from doratune.study.comparison.sentences import number

        self.over = len(over)
        told = f"{running} running"
        for done in (one for one in over if one.trial not in self.told):
            self.told.add(done.trial)
            score, unit = done.score(self.comparison.by_accuracy), "points" if self.comparison.by_accuracy else "nats"
            result = "diverged" if score is None else f"{number(score, unit)} {unit}"
            told = f"{done.trial.stage}: {name_of(self.comparison, done.trial)}: {result}"
            if not self.console.is_terminal:
                say(self.console, f"[{len(self.told)}/{count}] {told}")
        self.bar.update(self.task, completed=len(over), total=count, told=told)
        if not over and not self.console.is_terminal:
            say(self.console, f"[0/{count}] {told}")


def _print(findings: Findings, page: Path) -> None:
    from doratune.study.comparison import sentences

    out = Console(emoji=False)
    unit = findings.unit
    level = sentences.percent(findings.comparison.grid.confidence)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    score_name = "test %" if unit == "points" else "test loss"
    for name in ("", "rate", score_name, f"{level} interval", "seeds", "ms/step", "MiB"):
        table.add_column(name, justify="right" if name else "left", overflow="fold")
    for one in findings.standings:
        score = one.score
        table.add_row(
            one.contestant.name,
            f"{one.chosen.learning_rate:g}",
            "-" if score is None else sentences.number(score.mean, unit),
            "-" if score is None or score.count < 2 else sentences.interval(score, unit, signed=False),
            str(len(one.scores)),
            f"{1e3 * one.step_seconds:,.0f}",
            f"{one.peak_memory / 2**20:,.0f}",
        )
    out.print(table)
    told = [sentences.about_gap(findings, gap) for gap in findings.gaps]
    ends = sentences.about_edges(findings)
    if ends:
        ends += " If you add some to the recipe's learning_rates, the same command tries them."
    replaced = sentences.about_replaced(findings)
    for line in (*told, ends, replaced, *sentences.about_ranks(findings), *findings.problems):
        if line:
            out.print(line, markup=False, highlight=False)
    say(out, f"Written to {page.parent}: {page.name}")
