"""Predictions as rows of a CSV file and as records, and how many of them are right."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from doratune.errors import AdapterError
from doratune.files import whole_file
from doratune.inference.inputs import Input, Text
from doratune.inference.predictor import Prediction

DIGITS = 6
"""Of a probability."""


@dataclass
class Score:
    """Right answers among the labels that the model knows."""

    labels: tuple[str, ...]
    right: int = 0
    counted: int = 0
    unknown: dict[str, int] = field(default_factory=dict)
    """Labels of the data that the model does not know, and how often; they do not count."""

    def add(self, prediction: Prediction) -> None:
        """Take account of a prediction; one without a label does not count."""
        label = prediction.input.label
        if label is None:
            return
        if label not in self.labels:
            self.unknown[label] = self.unknown.get(label, 0) + 1
            return
        self.counted += 1
        self.right += prediction.label == label

    def lines(self) -> Iterator[str]:
        """In words; nothing where there were no labels."""
        if self.counted:
            yield f"accuracy {self.right / self.counted:.2%} ({self.right} of {self.counted})"
        if self.unknown:
            yield (
                f"not counted: {sum(self.unknown.values())} with labels that the model does not have, such as "
                f"{_some(self.unknown)} (it has {_some(self.labels)})"
            )


def _source(one: Input) -> str:
    """Where it is from, in UTF-8: what is none in a file's name is escaped."""
    return one.where.encode("utf-8", "backslashreplace").decode("utf-8")


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:5]) + (", ..." if len(names) > 5 else "")


class CsvFile:
    """A CSV file: source, text, label where there are labels, predicted, probability, and p_NAME of each class."""

    def __init__(self, file: Any, labels: Sequence[str], inputs: Sequence[Input]) -> None:
        self.writer = csv.writer(file)
        self.text = any(isinstance(one, Text) for one in inputs)
        self.label = any(one.label is not None for one in inputs)
        names = ["source", *["text"] * self.text, *["label"] * self.label, "predicted", "probability"]
        self.writer.writerow([*names, *(f"p_{label}" for label in labels)])

    def add(self, prediction: Prediction) -> None:
        """One row."""
        one = prediction.input
        text, label = [one.source] * self.text, [one.label or ""] * self.label
        numbers = (f"{p:.{DIGITS}f}" for p in (prediction.probability, *prediction.probabilities))
        self.writer.writerow([_source(one), *text, *label, prediction.label, *numbers])


@contextlib.contextmanager
def csv_file(path: Path, labels: Sequence[str], inputs: Sequence[Input]) -> Iterator[CsvFile]:
    """Write a CSV file whole or not at all.

    Raises:
        AdapterError: if it cannot be written.
    """
    try:
        with whole_file(path.resolve()) as file:  # a link stays one
            yield CsvFile(file, labels, inputs)
    except BrokenPipeError:  # of what is printed meanwhile: nobody reads it any more
        raise
    except OSError as error:
        raise AdapterError(f"cannot write {path}: {error.strerror or error}") from error


def record(prediction: Prediction, labels: Sequence[str]) -> dict[str, Any]:
    """For JSON: source, text, label, predicted, probability, probabilities by class."""
    one = prediction.input
    return {
        "source": _source(one),
        **({"text": one.source} if isinstance(one, Text) else {}),
        "label": one.label,
        "predicted": prediction.label,
        "probability": round(prediction.probability, DIGITS),
        "probabilities": {label: round(p, DIGITS) for label, p in zip(labels, prediction.probabilities, strict=True)},
    }
