"""Runs that nobody trains: results with scores that are made up."""

import dataclasses

from doratune.study.comparison.recipe import Comparison, Grid
from doratune.study.comparison.trials import Outcome, choose, scoring, sweep
from doratune.train import TrainConfig
from doratune.train.results import TrainResult

SWEPT = {"learning_rates": (1e-4, 1e-3)}
FIXED = {"learning_rates": (1e-3,)}


def comparison(task="text-classification", **grid):
    train = TrainConfig(model="m", data=("d.jsonl",), task=task, test_fraction=0.2, save_every=None)
    return Comparison(train, Grid(**{**FIXED, **grid}))


def result(accuracy=0.5, loss=1.0, **values):
    """A run's result; accuracy and loss stand for all data it was measured on."""
    known = {
        "task": "text-classification",
        "method": "dora",
        "rank": 4,
        "model": "m",
        "adapter": "a",
        "trained": 1100,
        "base": 100_000,
        "direction": 1000,
        "magnitude": 100,
        "steps": 10,
        "seed": 0,
        "loss_before": 2.0,
        "loss_after": loss,
        "accuracy_before": 0.1,
        "accuracy_after": accuracy,
        "example": "texts",
        "examples": 10,
        "held_out_examples": 10,
        "test_examples": 200,
        "test_loss": loss,
        "test_accuracy": accuracy,
        "seconds": 5.0,
        "unit": "texts",
        "speed": 1.0,
        "peak_memory": 2**20,
        "device": "cpu",
        "dtype": "float32",
    }
    return TrainResult(**{**known, **values})


def outcomes(of, score):
    """All runs of a comparison; ``score(trial)`` gives accuracy and loss, or None where training diverged."""
    found = []

    def add(trials):
        for trial in trials:
            scored = score(trial)
            made = None if scored is None else dataclasses.asdict(result(*scored))
            found.append(Outcome(trial, made, "the loss is nan" if made is None else None))

    add(sweep(of))
    add(scoring(of, choose(of, found)))
    return found
