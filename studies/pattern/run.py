"""Do full fine-tuning, LoRA and DoRA move magnitude and direction differently? `python studies/pattern/run.py`.

Section 3 of the paper on a model anybody can train in minutes: a ViT-S learns to read digits by full fine-tuning, LoRA
and DoRA; `doratune analyze` then compares every checkpoint with the base.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "examples"))

from assets import AssetError, digits, vit_small  # noqa: E402
from doratune.study.analysis import OVERALL, Run, analyze  # noqa: E402
from doratune.study.analysis_page import page_of  # noqa: E402
from doratune.study.analysis_plots import METHODS, interval, number, panels  # noqa: E402
from doratune.train.results import TrainResult  # noqa: E402

RATES = {"full": (3e-5,), "lora": (1e-3,), "dora": (1e-3,)}
"""Where there are several, the one with the lowest held-out loss at the first seed is used."""
SHOWN = ("query", "value")
"""Kinds of weights that the paper looked at, as the model calls them."""


@dataclass
class Options:
    """Train a vision transformer three ways, and look at how magnitudes and directions moved."""

    work: Path = Path("runs/pattern")
    """Folder for the runs, about 3 GB a seed; runs that are whole are used again."""
    output: Path = HERE
    """Folder for the page, the picture and the numbers."""
    seeds: int = 3
    """Runs of each method; the page shows the first."""
    steps: int = 100
    """Optimiser steps of each run."""
    checkpoints: int = 5
    """Evenly spaced over the steps."""


def main(options: Options) -> None:
    """Choose rates, train, compare, draw."""
    base, data = vit_small(), digits() / "train.npz"
    tried: dict[str, dict[float, TrainResult]] = {}
    chosen: dict[str, float] = {}
    for method, rates in RATES.items():
        tried[method] = {rate: train(method, rate, 0, base, data, options) for rate in rates}
        chosen[method] = min(rates, key=lambda rate, results=tried[method]: results[rate].loss_after)
    found: dict[str, list[Run]] = {method: [] for method in RATES}
    for seed in range(options.seeds):
        for method, rate in chosen.items():
            train(method, rate, seed, base, data, options)
        folders = {METHODS[method]: folder(method, rate, seed, options) for method, rate in chosen.items()}
        analysis = analyze(base, folders, spectra="none" if seed else "last", watch=progress)
        for method, run in zip(RATES, analysis.runs, strict=True):
            found[method].append(run)
        if seed == 0:
            analysis.base = base.name
            page = page_of(analysis, "python studies/pattern/run.py").html(files=False)
            (options.output / "report.html").write_text(page, encoding="utf-8")
            title = f"ViT-S learns digits: {options.checkpoints} checkpoints, {len(layers_of(analysis.runs[0]))} layers"
            panels(analysis.runs, SHOWN, title).savefig(options.output / "pattern.png", dpi=140)
    results = {
        "steps": options.steps,
        "rates": {m: {f"{r:g}": one(result) for r, result in each.items()} for m, each in tried.items()},
        "chosen": {method: f"{rate:g}" for method, rate in chosen.items()},
        "correlations": {
            method: [{kind: asdict(c) for kind, c in run.correlations().items()} for run in runs]
            for method, runs in found.items()
        },
        "over_layers_at_the_last_checkpoint": {
            method: [
                {kind or OVERALL: asdict(run.correlation(kind, options.checkpoints - 1)) for kind in [*run.kinds, None]}
                for run in runs
            ]
            for method, runs in found.items()
        },
    }
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(found))


def folder(method: str, rate: float, seed: int, options: Options) -> Path:
    """Where a run is."""
    return options.work / f"{method}-{rate:g}-seed{seed}"


def train(method: str, rate: float, seed: int, base: Path, data: Path, options: Options) -> TrainResult:
    """One run of `doratune train`, unless it is there already."""
    output = folder(method, rate, seed, options)
    if not (output / "results.json").is_file():
        shutil.rmtree(output, ignore_errors=True)
        every = options.steps // options.checkpoints
        flags = (
            f"--recipe quickstart-image --method {method} --learning-rate {rate} --seed {seed} --steps {options.steps}"
        )
        flags += f" --save-every {every} --keep {options.checkpoints} --eval-every {every} --model {base} --data {data}"
        command = [sys.executable, "-m", "doratune", "train", *shlex.split(flags), "--output", str(output)]
        print("$", shlex.join(command[1:]), flush=True)
        # Threads that wait for work sleep: faster where other programs use the cores, too.
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ})
    return TrainResult.load(output)


def one(result: TrainResult) -> dict[str, Any]:
    """What a run came to."""
    return {"held_out_loss": result.loss_after, "held_out_accuracy": result.accuracy_after}


def layers_of(run: Run) -> set[str | None]:
    """Layers that changed."""
    return {point.layer for point in run.changed}


def table(found: dict[str, list[Run]]) -> str:
    """Correlations by method, kind and seed, as Markdown."""
    seeds = len(found["full"])
    lines = ["| method | weights |" + "".join(f" seed {seed} |" for seed in range(seeds)), "|---" * (seeds + 2) + "|"]
    for method, runs in found.items():
        per_seed = [run.correlations() for run in runs]
        for kind in per_seed[0]:
            cells = [f"{number(each[kind].value)} {interval(each[kind])}" for each in per_seed]
            lines.append(f"| {METHODS[method]} | {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def progress(what: str, share: float) -> None:
    """One line that is written over."""
    print(f"\r{share:4.0%} {what[:60]:60}", end="" if share < 1 else "\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except AssetError as error:
        sys.exit(f"error: {error}")
