"""``doratune analyze``: how training moved magnitudes and directions, as a page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from doratune.cli.common import check, say
from doratune.extras import require
from doratune.hub import adapter_folder, base_folder
from doratune.study.analysis import Analysis, Spectra, analyze
from doratune.study.correlation import CONFIDENCE
from doratune.study.names import some
from doratune.study.page import folder_problem, without_nan
from doratune.study.runs import labels_of

NAMED = 8
"""Weights that were not compared which are named on the terminal, for each reason; the page names all."""


@dataclass
class Analyze:
    """Show how training moved the weights of a base model: magnitude and direction, spectra, new directions.

    Files are read weight by weight, no model is built. The report is one HTML page, with PNG and SVG of each plot, CSV
    of each table and everything as JSON beside it.
    """

    base: tyro.conf.Positional[str]
    """Base model: a folder with safetensors files, such a file, or a hub name."""
    tuned: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TUNED ...")]
    """What was trained from it: a full checkpoint or an adapter in PEFT's format (folders, or names on the hub), a run
    of doratune train, or a folder of checkpoint-N. Several are compared."""
    output: Path = Path("analysis")
    """Folder for the report; an earlier report there is replaced."""
    labels: tuple[str, ...] = ()
    """Names for what was trained, in the same order; not given: those of the folders."""
    spectra: Spectra = "last"
    """Checkpoints whose changes are decomposed into singular values, which takes the longest."""
    json: bool = False
    """Print everything as JSON, and write no report."""

    def problems(self) -> Iterator[str]:
        """Options that cannot work."""
        if not self.tuned:
            yield "name at least one checkpoint, adapter or folder of them"
        if self.labels and len(self.labels) != len(self.tuned):
            yield f"labels: expected {len(self.tuned)}, one for each of what was trained, found {len(self.labels)}"
        if len(set(self.labels)) != len(self.labels):
            yield "labels must differ"
        for path in self.tuned:
            if not path.exists():
                yield f"{path} does not exist"
        problem = None if self.json else folder_problem(self.output)
        if problem:
            yield problem


def run(options: Analyze) -> int:
    """Read, compare, write the page, print the correlations."""
    named = options.tuned
    options = dataclasses.replace(options, tuned=tuple(map(adapter_folder, named)))
    check(options.problems())
    if not options.json:
        require("matplotlib", "study")
        require("jinja2", "study")
    labels = list(options.labels) or labels_of(named)
    status = Console(stderr=True, emoji=False)
    shown = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*shown, console=status, transient=True, disable=not status.is_terminal) as bar:
        task = bar.add_task("Comparing", total=1.0)
        analysis = analyze(
            base_folder(options.base),
            dict(zip(labels, options.tuned, strict=True)),
            options.spectra,
            lambda what, share: bar.update(task, completed=share, description=what[-40:]),
        )
    if options.json:
        print(json.dumps(without_nan(analysis.as_json())))
        return 0
    from doratune.study.analysis_page import page_of, sentence

    command = " ".join(["doratune analyze", options.base, *map(str, named)])
    with status.status("Drawing"):
        page = page_of(analysis, command).write(options.output, analysis.as_json())
    out = Console(emoji=False)
    if any(run.kinds for run in analysis.runs):
        out.print(_table(analysis))
    for run in analysis.runs:
        if not run.kinds:  # it has no row
            say(out, sentence(run, None))
    for line in _left_out(analysis):
        say(out, line)
    say(out, f"Report: {page}")
    return 0


def _table(analysis: Analysis) -> Table:
    from doratune.study.analysis_plots import interval, number

    table = Table(title="correlation of ΔD with ΔM", box=SIMPLE_HEAD, pad_edge=False)
    table.caption = f"intervals: {CONFIDENCE:.0%}, bootstrapped over layers; paper: VL-BART, query and value"
    for name in ("run", "weights", "r", "interval", "sign", "points", "paper"):
        table.add_column(name, justify="left" if name in ("run", "weights", "sign") else "right", overflow="fold")
    for run in analysis.runs:
        for kind, c in run.correlations().items():
            cells = [
                escape(run.label),
                escape(kind),
                number(c.value),
                escape(interval(c)),
                c.sign,
                str(c.points),
                number(run.paper),
            ]
            table.add_row(*cells)
        table.add_section()
    return table


def _left_out(analysis: Analysis) -> Iterator[str]:
    """What was not compared, by reason."""
    for run in analysis.runs:
        for reason, names in run.reasons.items():
            yield f"{run.label}: not compared, {reason}: {some(names, NAMED)}"
