"""From rows to examples: what cannot be used is listed all at once, or left out and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from doratune.errors import AdapterError
from doratune.train.config import SPLIT_SEED, TrainConfig
from doratune.train.sources import LISTED, Row, read

_T = TypeVar("_T")
Say = Callable[[str], None]


class BadRow(ValueError):
    """Why a row cannot be used."""


def rows(names: Iterable[str], split: str, streaming: bool = False) -> Iterator[Row]:
    """Rows of several sources, one after the other."""
    for name in names:
        yield from read(name, split, streaming)


def gather(found: Iterable[Row], use: Callable[[Row], _T], config: TrainConfig, say: Say) -> list[_T]:
    """Make an example of every row.

    Args:
        found: the rows.
        use: gives the example, or raises ``BadRow``.
        config: says whether bad rows are left out.
        say: told how many were.

    Raises:
        AdapterError: listing the bad rows, or if no row can be used.
    """
    examples: list[_T] = []
    bad, listed = 0, list[str]()
    for row in found:
        try:
            examples.append(usable(row, use))
        except BadRow as error:
            bad += 1
            if len(listed) < LISTED:
                listed.append(f"{row.where}: {error}")
    if bad and not (config.skip_bad and examples):
        rest = [f"and {bad - LISTED} more"] if bad > LISTED else []
        advice = "; --skip-bad goes on without them" if examples else ""
        lines = [f"{bad} of {bad + len(examples)} rows cannot be used{advice}:", *listed, *rest]
        raise AdapterError("\n  - ".join(lines))
    if bad:
        say(f"{bad} of {bad + len(examples)} rows left out (--skip-bad), such as {listed[0]}")
    if not examples:
        raise AdapterError(f"{', '.join(config.data)}: no rows")
    return examples


def usable(row: Row, use: Callable[[Row], _T]) -> _T:
    """The example that a row makes.

    Raises:
        BadRow: if it makes none.
    """
    if row.problem:
        raise BadRow(row.problem)
    return use(row)


def lacks(values: Mapping[str, Any], columns: Iterable[str]) -> str | None:
    """The problem of a row whose values lack some of these columns; None if it has all."""
    missing = [column for column in columns if column not in values]
    if not missing:
        return None
    return f"has no column {', '.join(map(repr, missing))}; it has {', '.join(map(str, values))}"


def set_aside(
    found: Sequence[_T], fraction: float, group: Callable[[_T], int] | None = None
) -> tuple[list[_T], list[_T]]:
    """Split examples into those to train on and those to measure on, the same way every time.

    Args:
        found: the examples.
        fraction: to set aside; at least one where there are two, none for 0.
        group: class of an example: every class is split in the same proportion, and none set aside whole.
    """
    if not fraction:
        return list(found), []
    kept, held = hold_out(len(found), fraction, None if group is None else map(group, found))
    return [found[i] for i in kept], [found[i] for i in held]


def hold_out(count: int, fraction: float, groups: Iterable[int] | None = None) -> tuple[list[int], list[int]]:
    """Split indices into those to train on and those to measure on, the same way every time.

    Args:
        count: of all examples.
        fraction: to hold out; at least one where there are two.
        groups: class of each example: every class is split in the same proportion, and none held out whole: where each
            has one example only, none is held out.
    """
    order = np.random.default_rng(SPLIT_SEED).permutation(count)
    if groups is None:
        size = min(count - 1, max(1, round(count * fraction))) if count > 1 else 0
        return order[size:].tolist(), order[:size].tolist()
    classes = np.asarray(list(groups))[order]
    members = [order[classes == one] for one in np.unique(classes)]
    held = np.concatenate([own[: min(len(own) - 1, round(len(own) * fraction))] for own in members])
    if not len(held):
        _, which, sizes = np.unique(classes, return_inverse=True, return_counts=True)
        held = order[sizes[which] > 1][:1]
    return order[~np.isin(order, held)].tolist(), held.tolist()
