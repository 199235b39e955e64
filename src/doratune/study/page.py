"""Reports: sections of text, plots and tables as one HTML page that needs no network, with its files beside it.

``Page`` holds sections (``page.section``), a section holds plots, tables and texts (``section.add``), and
``page.write(folder, numbers)`` writes all of them.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doratune.errors import AdapterError
from doratune.extras import require
from doratune.files import output_problem, writing
from doratune.study.plots import as_svg, save_png, themed_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from doratune.study.plots import Tips

NAME = "report.html"
NUMBERS = "numbers.json"
NAMED = re.compile(r' data-(plot|table)="([\w-]+)"')
"""A plot or table in a page, with the name of its files."""


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    name: str
    format: str = ""
    """Of numbers, as in ``format(value, ".2f")``; "" for text. Numbers are aligned right and sorted as such."""
    hint: str = ""
    """Shown when the mouse rests on the heading."""

    @property
    def is_number(self) -> bool:
        """Whether values are numbers."""
        return bool(self.format)

    def show(self, value: Any) -> str:
        """A value as text; nothing and NaN as a dash."""
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "–"
        return format(value, self.format).replace("-", "−") if self.is_number else str(value)


@dataclass(frozen=True)
class Table:
    """A table that sorts; the page's folder gets its numbers with 12 digits as ``NAME.csv``."""

    name: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    searchable: bool = False
    """Give it a box in which rows are looked for."""
    groups: Sequence[str] | None = None
    """For each row, whose marks in plots it belongs to: they light up together."""

    kind = "table"

    def cells(self) -> list[list[tuple[str, str]]]:
        """Text of each cell, and what it is sorted by: "" where there is no value."""
        return [
            [(column.show(value), _sort_key(value)) for column, value in zip(self.columns, row, strict=True)]
            for row in self.rows
        ]

    def write_csv(self, folder: Path) -> None:
        """Write ``NAME.csv``."""
        with (folder / f"{self.name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([column.name for column in self.columns])
            writer.writerows([[_plain(value) for value in row] for row in self.rows])


@dataclass(frozen=True)
class Plot:
    """A matplotlib figure; the page's folder gets ``NAME.png`` and ``NAME.svg``."""

    name: str
    figure: Figure
    caption: str = ""
    tips: Tips = field(default_factory=dict)
    """What is shown on hover, for each mark of the artists with a gid."""
    wide: bool = False
    """Across the whole page; others share a row."""

    kind = "plot"

    @property
    def label(self) -> str:
        """What it shows, in words."""
        titles = [title for axes in self.figure.axes if (title := axes.get_title())]
        return ". ".join([*titles, *([self.caption] if self.caption else [])]).replace("\n", ", ") or self.name

    @cached_property
    def svg(self) -> str:
        """The figure as an SVG file."""
        return as_svg(self.figure)


@dataclass(frozen=True)
class Text:
    """A paragraph, or a list of lines behind a heading that opens it."""

    text: str
    lines: Sequence[str] = ()

    kind = "text"


@dataclass(frozen=True)
class Heading:
    """Between the items of a section."""

    text: str

    kind = "heading"


Item = Plot | Table | Text | Heading


@dataclass
class Section:
    """A heading, an introduction, and what follows."""

    heading: str
    text: str = ""
    items: list[Item] = field(default_factory=list)

    def add(self, *items: Item) -> None:
        """Put plots, tables and texts after each other; neighbouring plots share rows."""
        self.items.extend(items)

    @property
    def anchor(self) -> str:
        """For links to it."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.heading.lower())

    @property
    def blocks(self) -> list[tuple[str, list[Item]]]:
        """Items, neighbouring ones of a kind together."""
        return [(kind, list(group)) for kind, group in groupby(self.items, key=lambda item: item.kind)]


@dataclass
class Page:
    """A report."""

    title: str
    lead: str = ""
    """What was found, in a sentence or two."""
    facts: Sequence[tuple[str, str]] = ()
    """What was looked at: names and values, under the title."""
    findings: Sequence[tuple[str, str, str]] = ()
    """The few numbers that matter: a label, a value, and what belongs beside it."""
    sections: list[Section] = field(default_factory=list)
    footer: str = ""

    def section(self, heading: str, text: str = "") -> Section:
        """Begin a section."""
        self.sections.append(Section(heading, text))
        return self.sections[-1]

    def html(self) -> str:
        """The page.

        Raises:
            AdapterError: if jinja2 is not installed.
        """
        jinja2 = require("jinja2", "study")
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        # Many marks, in several plots, are the same weight: each text stands in the page once.
        tips: dict[str, int] = {}
        svgs = {plot.name: themed_svg(plot.svg, plot.name, plot.label, plot.tips, tips) for plot in self._plots()}
        text: str = environment.get_template("page.html.j2").render(page=self, svgs=svgs, tips=list(tips))
        return text

    def write(self, folder: Path, numbers: Any) -> Path:
        """Write ``report.html``, a PNG and an SVG of each plot, a CSV of each table and ``numbers.json``.

        Args:
            folder: an earlier report there is replaced; files of its plots and tables that this one lacks are removed.
            numbers: everything the page is made of, as JSON has it; NaN becomes null.

        Returns:
            The page.

        Raises:
            AdapterError: if the folder holds something else than a report, or cannot be written.
        """
        problem = folder_problem(folder)
        if problem:
            raise AdapterError(problem)
        html = self.html()
        earlier = _files_of(folder / NAME)
        with writing(folder, "the report") as staging:
            for plot in self._plots():
                save_png(plot.figure, staging / f"{plot.name}.png")
                (staging / f"{plot.name}.svg").write_text(plot.svg, encoding="utf-8")
            for item in self._items():
                if isinstance(item, Table):
                    item.write_csv(staging)
            (staging / NUMBERS).write_text(json.dumps(without_nan(numbers), indent=1) + "\n", encoding="utf-8")
            (staging / NAME).write_text(html, encoding="utf-8")
        for name in earlier - _files_of(folder / NAME):
            with contextlib.suppress(OSError):  # the report is whole without
                (folder / name).unlink()
        return folder / NAME

    def _plots(self) -> Iterable[Plot]:
        return (item for item in self._items() if isinstance(item, Plot))

    def _items(self) -> Iterable[Item]:
        return (item for section in self.sections for item in section.items)


def _files_of(page: Path) -> set[str]:
    """Names of the files that a report wrote for its plots and tables; nothing else in its folder is its own."""
    try:
        found = NAMED.findall(page.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # there is none, or it is no report
        return set()
    ends = {"plot": ("png", "svg"), "table": ("csv",)}
    return {f"{name}.{end}" for kind, name in found for end in ends[kind]}


def folder_problem(folder: Path) -> str | None:
    """Why a report cannot go to a folder, as far as one can see before it is made, or None."""
    if problem := output_problem(folder):
        return problem
    if folder.is_dir() and any(folder.iterdir()) and not (folder / NAME).is_file():
        return f"output {folder} is not empty and holds no report that could be replaced; name another folder"
    return None


def without_nan(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return value


def _plain(value: Any) -> Any:
    """As a table of numbers has it, without the noise of float64's last digits."""
    return "" if value is None else f"{value:.12g}" if isinstance(value, float) else value


def _sort_key(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return repr(value) if isinstance(value, int | float) else str(value)
