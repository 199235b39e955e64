"""Texts and images to classify, found with the readers of training: a label is read where there is one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from doratune.errors import AdapterError
from doratune.inference.lines import lines_of
from doratune.train import images, sources
from doratune.train.columns import choose
from doratune.train.config import TrainConfig
from doratune.train.gather import BadRow, Say, gather, lacks
from doratune.train.images import SUFFIXES, Picture, pictures
from doratune.train.labels import name_of
from doratune.train.sources import Row, path_of
from doratune.train.tasks.image import checked
from doratune.train.tokens import string

ABSENT = "no such file or folder"
SPLIT = "test"
"""Of data sets that have several."""


@dataclass(frozen=True)
class Text:
    """One text, and the name of its class if that is known."""

    where: str
    source: str
    label: str | None


Input = Text | Picture


def read_texts(config: TrainConfig, trained: Mapping[str, str], say: Say) -> list[Text]:
    """Read texts: tables with a column for them, data sets, and text files, of which every line is one.

    Args:
        config: ``data`` are the sources; columns, and whether bad rows are left out.
        trained: columns in training; they are looked for before usual names.
        say: told of rows left out, and of labels that are none.

    Raises:
        AdapterError: listing every row and source that cannot be used.
    """
    label_of = _labels(config, say)

    def find(name: str) -> Iterator[Row]:
        return _texts(name, _with_columns(config, name, trained))

    def use(row: Row) -> Text:
        return Text(row.where, string(row.values["text"], "text"), label_of(row))

    return gather(_rows(config, sources.problem_of, find), use, config, say)


def read_pictures(config: TrainConfig, trained: Mapping[str, str], say: Say) -> list[Picture]:
    """Find images: files, folders, ``.npz``, tables with paths, data sets. Each is opened once to see that it can be.

    Args:
        config: ``data`` are the sources; columns, and whether bad images are left out.
        trained: columns in training; they are looked for before usual names.
        say: told of images left out, of files passed over, and of labels that are none.

    Raises:
        AdapterError: listing every image and source that cannot be used.
    """
    label_of = _labels(config, say)

    def find(name: str) -> Iterator[Row]:
        found, _ = pictures(name, _with_columns(config, name, trained), SPLIT, "test", labelled=False, say=say)
        empty = True
        for row in found:
            empty = False
            yield row
        if empty:
            yield Row(name, problem=f"holds no image ({', '.join(SUFFIXES)})")

    def use(row: Row) -> Picture:
        return Picture(row.where, row.values["image"], label_of(row))

    with ThreadPoolExecutor() as pool:  # decoding runs outside of Python's lock
        rows = _rows(config, _image_problem, find)
        return gather(pool.map(checked, rows), use, config, say)


def _rows(
    config: TrainConfig, problem_of: Callable[[str], str | None], find: Callable[[str], Iterator[Row]]
) -> Iterator[Row]:
    """Rows of all sources; a source that cannot be read is a row with a problem.

    Raises:
        AdapterError: if none of the sources is there: then there are no rows to speak of.
    """
    absent = [f"{name}: {ABSENT}" for name in config.data if not path_of(name).exists()]
    if len(absent) == len(config.data):
        raise AdapterError.of("nothing to classify", absent)
    for name in config.data:
        problem = problem_of(name) if path_of(name).exists() else ABSENT
        if problem:
            yield Row(name, problem=problem)
            continue
        try:
            yield from find(name)
        except AdapterError as error:
            yield Row(name, problem=re.sub(rf"^{re.escape(name)}[:\d]* ", "", str(error)))


def _image_problem(name: str) -> str | None:
    path = path_of(name)
    if path.is_dir() or path.suffix.lower() in SUFFIXES:
        return None
    problem = images.problem_of(name)
    return problem and f"is not an image ({', '.join(SUFFIXES)}), a folder, an .npz archive or a table of images"


def _texts(name: str, config: TrainConfig) -> Iterator[Row]:
    columns: dict[str, str] = {}
    known = dict.fromkeys(sources.columns_of([name], SPLIT)[0])
    for row in lines_of(name, SPLIT):
        if not row.problem and "label" not in columns:  # the first rows may have none
            known.update(row.values)
            columns = {**choose(config, list(known), ["text"], row.where, ["label"]), **columns}
        problem = row.problem or lacks(row.values, [columns["text"]])
        yield Row(row.where, {role: row.values.get(column) for role, column in columns.items()}, problem)


def _with_columns(config: TrainConfig, name: str, trained: Mapping[str, str]) -> TrainConfig:
    """With the columns of training where the source has them and the options do not say others."""
    if not sources.has_columns(name):
        return config
    found, _ = sources.columns_of([name], SPLIT)
    flags: dict[str, Any] = {f"{role}_column": column for role, column in trained.items() if column in found}
    return dataclasses.replace(config, **{flag: v for flag, v in flags.items() if getattr(config, flag) is None})


def _labels(config: TrainConfig, say: Say) -> Callable[[Row], str | None]:
    """What reads a row's label. Labels are optional: in a column that the user did not name, one may be no class."""
    told = False

    def label_of(row: Row) -> str | None:
        nonlocal told
        value = row.values.get("label")
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        try:
            return name_of(value)
        except BadRow as error:
            if config.label_column is not None:
                raise
            if not told:
                say(f"{row.where}: {error}; such labels are passed over, --label-column names another column")
            told = True
            return None

    return label_of
