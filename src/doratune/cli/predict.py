"""``doratune predict``: classes of texts and images."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from doratune.cli.common import check, say
from doratune.errors import AdapterError
from doratune.hub import adapter_folder
from doratune.inference.loading import QuantizeToUse
from doratune.train.checks import quantize_problems
from doratune.train.choices import Dtype
from doratune.train.config import TrainConfig
from doratune.train.models import choose_dtype
from doratune.train.quiet import quiet_libraries

if TYPE_CHECKING:
    from doratune.inference.inputs import Input
    from doratune.inference.predictor import Prediction, Predictor

SHOWN = 20
"""Predictions that are printed where they go to no file."""


@dataclass
class Predict:
    """Classify texts or images. Where the data have labels, the accuracy is printed.

    Texts: .jsonl, .csv and other tables with a column for them, or text files with one a line. Images: files, folders
    (subfolders are labels), .npz archives, tables with paths.
    """

    adapter: tyro.conf.Positional[Path]
    """Folder of an adapter, as written by doratune or PEFT, or its name on the hub; or the folder of a whole model."""
    files: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE ...")]
    """What to classify."""
    output: Path | None = None
    """CSV file to write; one that is there is replaced. none: the first predictions are printed."""
    json: bool = False
    """Print one JSON object per text or image: source, text, label, predicted, probability, probabilities."""
    base: str | None = None
    """Base model, a folder or hub name; none: the one that the adapter names."""
    text_column: str | None = None
    """Column of the text; none: that of training, or guessed. The same holds for the other columns."""
    label_column: str | None = None
    """Column of the class."""
    image_column: str | None = None
    """Column of the image's path."""
    skip_bad: bool = False
    """Go on without files and rows that cannot be used, and count them; otherwise they are listed as an error."""
    batch_size: int = 16
    """Texts or images at a time."""
    dtype: Dtype = "auto"
    """Of the base weights; auto: as in training, else bfloat16 on a GPU that has it, else float32."""
    quantize: QuantizeToUse = "auto"
    """Load the base in 4 or 8 bits; auto: as in training; none: in full precision."""

    def problems(self) -> Iterator[str]:
        """Options that cannot work."""
        if not self.files:
            yield "name at least one file or folder to classify"
        yield from quantize_problems(self.quantize)
        if self.batch_size < 1:
            yield f"batch_size must be above 0; found {self.batch_size}"
        if self.output is None:
            return
        if self.output.is_dir() or not self.output.absolute().parent.is_dir():
            yield f"output {self.output}: expected a file in a folder that exists"
        elif self.output.exists() and not self.output.is_file():  # which the file would replace
            yield f"output {self.output}: expected a file, found a device or a pipe; --json prints what could go there"
        elif not os.access(self.output.absolute().parent, os.W_OK | os.X_OK):
            yield f"output {self.output}: {self.output.absolute().parent} is not writable; name another folder"
        elif self.output.resolve() in {Path(name).expanduser().resolve() for name in self.files}:
            yield f"output {self.output} is one of the files to classify; name another"


def run(options: Predict) -> int:
    """Check, read, load, classify."""
    from doratune.inference.inputs import read_pictures, read_texts
    from doratune.inference.predictions import Score, csv_file, record
    from doratune.inference.predictor import Classifier, Predictor

    check(options.problems())
    choose_dtype(options.dtype)
    quiet_libraries()
    status = Console(stderr=True, emoji=False)
    adapter = adapter_folder(options.adapter)
    found = Classifier.find(adapter, options.base)
    what, column = ("images", "text_column") if found.takes_images else ("texts", "image_column")
    if getattr(options, column) is not None:
        raise AdapterError(f"{adapter} classifies {what}; leave {column} out")
    reading = TrainConfig(
        model=found.base,
        data=options.files,
        text_column=options.text_column,
        label_column=options.label_column,
        image_column=options.image_column,
        skip_bad=options.skip_bad,
    )
    read: Any = read_pictures if found.takes_images else read_texts
    inputs = read(reading, found.about.columns, lambda line: say(status, line))
    if told := found.loading(options.dtype, options.quantize).told:
        say(status, told)
    with status.status(Text(f"Loading {found.base}")):
        predictor = Predictor.load(found, options.dtype, options.quantize)
    score = Score(predictor.labels)
    first: list[Prediction] = []
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(csv_file(options.output, predictor.labels, inputs)) if options.output else None
        for prediction in _predictions(predictor, inputs, options.batch_size, status):
            score.add(prediction)
            if file:
                file.add(prediction)
            if options.json:
                print(json.dumps(record(prediction, predictor.labels), ensure_ascii=False), flush=True)
            elif len(first) < SHOWN:
                first.append(prediction)
    out = status if options.json else Console(emoji=False)
    if predictor.cut:
        say(status, f"{predictor.cut} of {len(inputs)} texts were cut to {predictor.max_length} tokens")
    if file:
        say(out, f"{len(inputs)} predictions written to {options.output}")
    elif not options.json:
        _show(out, first, len(inputs))
    for line in score.lines():
        say(out, line)
    return 0


def _predictions(predictor: Predictor, inputs: list[Input], size: int, status: Console) -> Iterator[Prediction]:
    """In batches, with a bar."""
    with Progress(console=status, transient=True, disable=not status.is_terminal) as bar:
        task = bar.add_task("Classifying", total=len(inputs))
        for start in range(0, len(inputs), size):
            yield from predictor.predict(inputs[start : start + size])
            bar.advance(task, size)


def _show(out: Console, first: list[Prediction], count: int) -> None:
    """The first predictions in a table."""
    from doratune.train.images import Picture

    labelled = any(prediction.input.label is not None for prediction in first)
    table = Table()
    for name in ("input", *(["label"] if labelled else []), "predicted"):
        table.add_column(name, overflow="fold")
    table.add_column("probability", justify="right")
    for prediction in first:
        one = prediction.input
        shown = one.where if isinstance(one, Picture) else shorten(one.source, 80, placeholder="...")
        cells = [shown, *([one.label or ""] if labelled else []), prediction.label, f"{prediction.probability:.1%}"]
        table.add_row(*map(escape, cells))
    out.print(table)
    if count > len(first):
        say(out, f"and {count - len(first)} more; --output FILE.csv writes all")
