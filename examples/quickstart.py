"""DoRA on a real language model in a few minutes: `make quickstart`, or `python examples/quickstart.py --help`.

Fine-tunes SmolLM2-135M on the tales of the brothers Grimm three times, with DoRA at rank 16, DoRA at rank 8 and LoRA at
rank 16: the same text, order and number of steps. Then it shows what that did, and merges one of the adapters in a new
process. Every run is a `doratune train` of its own, so that its time and memory are its own, too.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from assets import AssetError, grimm_tales, smollm2
from doratune.train.curves import draw_curves
from doratune.train.results import TrainResult, read_metrics

console = Console()


@dataclass(frozen=True)
class Run:
    """One way to fine-tune."""

    label: str
    folder: str
    flags: tuple[str, ...]


# alpha is twice the rank, as in the paper, so that the size of an update does not depend on the rank.
RUNS = (
    Run("DoRA rank 16", "dora-r16", ("--method", "dora", "--rank", "16", "--alpha", "32")),
    Run("DoRA rank 8", "dora-r8", ("--method", "dora", "--rank", "8", "--alpha", "16")),
    Run("LoRA rank 16", "lora-r16", ("--method", "lora", "--rank", "16", "--alpha", "32")),
)
SHOWN = RUNS[0]  # the sample is its, and it is merged


@dataclass
class Options:
    """Fine-tune SmolLM2-135M on Grimm's tales with DoRA and LoRA, and compare."""

    output: Path = Path("quickstart-output")
    """Folder for everything; results of an earlier quickstart there are replaced."""
    steps: int = 24
    """Optimiser steps of each run."""
    batch_size: int = 4
    """Blocks in a step."""
    max_length: int = 128
    """Tokens in a block."""
    learning_rate: float = 1e-3
    """Highest learning rate, of everything that is trained."""
    eval_fraction: float = 0.02
    """Share of the text that is held out."""
    seed: int = 0
    """Of start values and order; one seed says nothing about which method is better."""
    prompt: str = "Once upon a time there was a king who"
    """Text to be continued before and after."""


def main(options: Options) -> None:
    """All of it, from top to bottom."""
    model, text = smollm2(), grimm_tales()
    console.print(f"Model: {model}\nText:  {text}", highlight=False, soft_wrap=True)
    results = {}
    for run in RUNS:
        console.rule(run.label)
        results[run.label] = train(run, model, text, options)
    console.rule("Results")
    show(results, options)
    metrics = {run.label: read_metrics(options.output / run.folder / "metrics.jsonl") for run in RUNS}
    picture = options.output / "curves.png"
    draw_curves(metrics, picture, "SmolLM2-135M on Grimm's tales: one seed each, it shows that training works")
    merge(model, options)
    console.print(f"Curves: {picture}. Adapters, in PEFT's format: {options.output}/*/adapter", highlight=False)


def train(run: Run, model: Path, text: Path, options: Options) -> TrainResult:
    """One fresh process; its progress goes to the terminal, its results are read from its folder."""
    folder = options.output / run.folder
    shutil.rmtree(folder, ignore_errors=True)
    settings = {
        "--model": model,
        "--data": text,
        "--output": folder,
        "--steps": options.steps,
        "--batch-size": options.batch_size,
        "--max-length": options.max_length,
        "--learning-rate": options.learning_rate,
        "--eval-fraction": options.eval_fraction,
        "--seed": options.seed,
        "--prompt": options.prompt,
        "--sample-tokens": 40,
        "--dtype": "float32",
        "--log-every": 1,
        "--eval-every": max(1, options.steps // 3),
        "--save-every": "None",
    }
    call("train", *run.flags, *(str(word) for pair in settings.items() for word in pair))
    return TrainResult.load(folder)


def call(*arguments: str) -> str:
    """Run the `doratune` command in a new process and return what it printed; end here if it failed."""
    # Threads that wait for work sleep instead of spinning: many times faster where other programs use the cores, too.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    command = [sys.executable, "-m", "doratune", *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if result.returncode:
        sys.exit(f"error: doratune {shlex.join(arguments)} ended with {result.returncode}")
    return result.stdout


def show(results: dict[str, TrainResult], options: Options) -> None:
    """The table and the sample."""
    any_result = next(iter(results.values()))
    tokens = options.steps * options.batch_size * options.max_length
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title=f"{options.steps} steps, {tokens:,} tokens each; held out: {any_result.held_out_examples} blocks",
        caption="One run of one seed shows that it works, not which method is better.",
    )
    for name in ("", "trained", "on LoRA", "on model", "before", "after", "seconds", "MiB"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for label, result in results.items():
        magnitudes = result.magnitude > 0
        table.add_row(
            label,
            f"{result.trained:,}",
            f"{result.extra_over_lora:+.2%}" if magnitudes else "-",
            f"{result.extra_over_model:+.3%}" if magnitudes else "-",
            f"{result.perplexity_before:.2f}",
            f"{result.perplexity_after:.2f}",
            f"{result.seconds:.0f}",
            f"{result.peak_memory / 2**20:,.0f}",
        )
    console.print(table)
    console.print(
        "trained: parameters. on LoRA: what magnitudes add to LoRA's parameters at the same rank; on model: the same "
        "to those of the whole model. before, after: perplexity on held-out text. MiB: peak memory of the process.",
        style="dim",
    )
    sample = results[SHOWN.label]
    for when, written in (("before", sample.sample_before), (f"after ({SHOWN.label})", sample.sample_after)):
        console.print(f"\n[bold]{when}[/bold]")
        console.print(f"{options.prompt}{written}", markup=False, highlight=False)
    console.print()


def merge(model: Path, options: Options) -> None:
    """Reload one adapter in a new process, merge it, compare merged with unmerged."""
    console.rule("Merging")
    merged = options.output / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    adapter = options.output / SHOWN.folder / "adapter"
    arguments = [str(adapter), "--base", str(model), "--output", str(merged), "--verify", "--json"]
    found = json.loads(call("merge", *arguments))
    logits = found["logits"]
    size = sum(file.stat().st_size for file in merged.iterdir()) / 1e6
    console.print(
        f"{SHOWN.label}, reloaded in a new process and merged ({found['layers']} layers): logits differ by "
        f"{logits['difference']:.1e} at most, where they reach {logits['largest']:.1f}; single layers by "
        f"{found['largest_difference']:.1e} of their largest output.\nMerged model ({size:.0f} MB): {merged}",
        highlight=False,
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except AssetError as error:
        sys.exit(f"error: {error}")
