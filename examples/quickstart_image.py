"""DoRA on a vision transformer in minutes: `make quickstart-image`, or `python examples/quickstart_image.py --help`.

Teaches a ViT-S to read handwritten digits three times: with DoRA, with LoRA, and by its head alone (a linear probe);
the same images, order and number of steps. Then DoRA's adapter, reloaded in a new process, reads the images held out,
and a picture shows what it made of them. Every run is a `doratune train` of its own.
"""

import csv
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.box import SIMPLE_HEAD
from rich.table import Table

from assets import AssetError, digits, vit_small
from doratune.train.results import TrainResult, read_metrics
from quickstart import Run, call, console

RUNS = (
    Run("DoRA rank 8", "dora-r8", ("--method", "dora")),
    Run("LoRA rank 8", "lora-r8", ("--method", "lora")),
    Run("linear probe", "head", ("--method", "head")),
)
SHOWN = RUNS[0]  # predictions are its
EACH = 10
"""Images of digits in the picture, read right; and read wrong."""


@dataclass
class Options:
    """Teach a vision transformer to read digits with DoRA, LoRA and a linear probe, and compare."""

    output: Path = Path("quickstart-output/image")
    """Folder for everything; results of an earlier quickstart there are replaced."""
    steps: int = 100
    """Optimiser steps of each run."""
    batch_size: int = 16
    """Images in a step."""
    image_size: int = 56
    """Pixels of the square that images are scaled to."""
    learning_rate: float = 1e-3
    """Highest learning rate, of everything that is trained."""
    seed: int = 0
    """Of start values and order; one seed says nothing about which method is better."""


def main(options: Options) -> None:
    """All of it, from top to bottom."""
    model, images = vit_small(), digits()
    console.print(f"Model:  {model}\nImages: {images}", highlight=False, soft_wrap=True)
    results = {}
    for run in RUNS:
        console.rule(run.label)
        results[run.label] = train(run, model, images, options)
    console.rule("Results")
    show(results, options)
    predictions = options.output / "predictions.csv"
    said = call("predict", results[SHOWN.label].adapter, str(images / "test.npz"), "--output", str(predictions))
    console.print(f"{SHOWN.label}, reloaded in a new process:\n{said.strip()}", highlight=False, soft_wrap=True)
    picture = options.output / "quickstart-image.png"
    metrics = {run.label: read_metrics(options.output / run.folder / "metrics.jsonl") for run in RUNS}
    draw(metrics, read_predictions(predictions, images / "test.npz"), picture)
    console.print(f"Picture: {picture}. Adapters, in PEFT's format: {options.output}/*/adapter", highlight=False)


def train(run: Run, model: Path, images: Path, options: Options) -> TrainResult:
    """One fresh process; its progress goes to the terminal, its results are read from its folder."""
    folder = options.output / run.folder
    shutil.rmtree(folder, ignore_errors=True)
    settings = {
        "--recipe": "quickstart-image",
        "--model": model,
        "--data": images / "train.npz",
        "--eval-data": images / "test.npz",
        "--output": folder,
        "--steps": options.steps,
        "--batch-size": options.batch_size,
        "--image-size": options.image_size,
        "--learning-rate": options.learning_rate,
        "--seed": options.seed,
        "--eval-every": max(1, options.steps // 4),
        "--save-every": "None",
    }
    call("train", *run.flags, *(str(word) for pair in settings.items() for word in pair))
    return TrainResult.load(folder)


def show(results: dict[str, TrainResult], options: Options) -> None:
    """The table."""
    any_result = next(iter(results.values()))
    seen = options.steps * options.batch_size
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        title=f"{options.steps} steps, {seen:,} images each; held out: {any_result.held_out_examples:,} images",
        caption="One run of one seed shows that it works, not which method is better.",
    )
    for name in ("", "trained", "on LoRA", "before", "after", "images/s", "seconds", "MiB"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for label, result in results.items():
        table.add_row(
            label,
            f"{result.trained:,}",
            f"{result.extra_over_lora:+.2%}" if result.magnitude else "-",
            f"{result.accuracy_before:.1%}",
            f"{result.accuracy_after:.1%}",
            f"{result.speed:.0f}",
            f"{result.seconds:.0f}",
            f"{result.peak_memory / 2**20:,.0f}",
        )
    console.print(table)
    console.print(
        "trained: parameters, the new head's included. on LoRA: what magnitudes add to LoRA's parameters. "
        "before, after: held-out images read right. MiB: peak memory of the process.",
        style="dim",
    )


@dataclass(frozen=True)
class Read:
    """One image, what it is and what it was taken for."""

    image: Any  # uint8 [28, 28]
    label: str
    predicted: str
    probability: float


def read_predictions(path: Path, archive: Path) -> list[Read]:
    """The rows of `doratune predict`'s file, each with its image, which the source names by number."""
    images = np.load(archive)["images"]
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = [int(re.fullmatch(r".*\[(\d+)\]", row["source"])[1]) for row in rows]
    return [
        Read(images[number], row["label"], row["predicted"], float(row["probability"]))
        for number, row in zip(numbers, rows, strict=True)
    ]


def draw(metrics: dict[str, list[dict[str, Any]]], read: list[Read], path: Path) -> None:
    """Held-out accuracy and loss over the steps; an image of each digit, and the surest mistakes."""
    figure = Figure(figsize=(12, 4.2), dpi=120, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.5, 1], wspace=0.04)
    accuracy, loss = left.subplots(1, 2)
    for axes, key, name in (
        (accuracy, "eval_accuracy", "images read right"),
        (loss, "eval_loss", "loss, nats per image"),
    ):
        for number, (label, records) in enumerate(metrics.items()):
            points = [(record["step"], record[key]) for record in records if key in record]
            # Lines that lie on each other: the first is the widest, so that it shows beside the next.
            look = {"linewidth": 4 - 1.2 * number, "markersize": 9 - 2 * number, "label": label}
            axes.plot(*zip(*points, strict=True), marker="o", **look)
        axes.set_xlabel("step")
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    accuracy.set_ylim(0, 1)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    loss.set_ylim(bottom=0)
    loss.legend(frameon=False, fontsize=9)
    left.suptitle(f"{len(read):,} images held out", fontsize=11)
    first = [next(one for one in read if one.label == str(digit)) for digit in range(EACH)]
    wrong = sorted((one for one in read if one.predicted != one.label), key=lambda one: -one.probability)[:EACH]
    above, below = right.subfigures(2, 1)
    above.suptitle(f"{SHOWN.label} reads the first of each digit", fontsize=11)
    below.suptitle("its surest mistakes: what it is → what it read", fontsize=11)
    for part, row in ((above, first), (below, wrong)):
        for axes, one in zip(part.subplots(2, EACH // 2).flat, row, strict=False):
            axes.imshow(one.image, cmap="gray_r")
            mistaken = one.predicted != one.label
            said = f"{one.label} → {one.predicted}" if mistaken else one.predicted
            axes.set_title(said, fontsize=10, color="firebrick" if mistaken else "black", pad=2)
        for axes in part.axes:
            axes.set_axis_off()
    figure.savefig(path)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except AssetError as error:
        sys.exit(f"error: {error}")
