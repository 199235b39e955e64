"""Classes: their names, in an order that does not depend on the data's, and how well they are told apart."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from doratune.errors import AdapterError
from doratune.train.gather import BadRow


def name_of(value: Any) -> str:
    """The name of a class: text as it is, whole numbers as digits.

    Raises:
        BadRow: for anything else.
    """
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int | np.integer):
        return str(int(value))
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise BadRow(
        "label is empty"
        if value is None or value == ""
        else f"label: expected a name or a whole number, found {value!r}"
    )


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Names sorted, numbers as numbers.

    Raises:
        AdapterError: if there are not two of them.
    """
    found = set(names)
    if len(found) < 2:
        raise AdapterError(
            "a classifier needs at least two classes; the data to train on have "
            + (f"only {sorted(found)[0]!r}" if found else "none")
        )
    if all(re.fullmatch(r"-?\d+", name) for name in found):
        return tuple(sorted(found, key=lambda name: (int(name), name)))  # "1" and "01" are two names
    return tuple(sorted(found))


def refuse_unknown(names: Collection[str], known: Collection[str], option: str) -> None:
    """Data to measure on have to have the classes of the data to train on.

    Raises:
        AdapterError: naming the others.
    """
    others = sorted(set(names) - set(known))
    if others:
        raise AdapterError(
            f"{option} has classes that the data to train on lack: {', '.join(others[:10])}; known are "
            f"{', '.join(list(known)[:10])}"
        )


def most_likely(logits: Any, labels: Any) -> Any:
    """What is kept of each batch for the metrics: the number of the likeliest class."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def accuracy(prediction: Any) -> Mapping[str, float]:
    """Share of right answers."""
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}
