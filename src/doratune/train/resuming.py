"""Whether a run can go on from its last checkpoint, found before anything large is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from doratune.train import recipe
from doratune.train.checkpoints import checkpoints, find_last
from doratune.train.config import TrainConfig, comparable
from doratune.train.output import CHECKPOINTS, RECIPE
from doratune.train.results import TrainResult
from doratune.train.without_effect import LOW_RANK, SIZES

MEASURED_ON = ("eval_data", "eval_fraction", "eval_split")
OF_THE_ADAPTER = (*SIZES, "targets", "exclude", "bias", "modules_to_save")
"""Options without which a checkpoint's adapter would be another function, or not fit."""


def problems(config: TrainConfig) -> Iterator[str]:
    """Why the run in the output folder cannot be resumed with these options."""
    output = config.output
    if not checkpoints(output / CHECKPOINTS) and not (output / RECIPE).is_file():
        yield f"output {output} holds no checkpoint to resume from"
    elif why := _finished(config):
        yield f"nothing is left to train: {why}"
    elif find_last(output / CHECKPOINTS)[0] is not None and (output / RECIPE).is_file():
        yield from _changed(config)


def past(step: int, steps: int) -> str:
    """That a checkpoint is beyond the steps asked for."""
    return f"the last checkpoint is at step {step}, and {steps} steps are asked for; ask for more"


def since_best(log: Iterable[Mapping[str, Any]], best: int | None) -> int:
    """Held-out measurements after the best step that a Trainer's log holds."""
    return len({entry["step"] for entry in log if "eval_loss" in entry and entry["step"] > (best or 0)})


def _finished(config: TrainConfig) -> str | None:
    """Why a run has no more to do: it has left its results, or is past the steps asked for; None if it has."""
    output, (last, _) = config.output, find_last(config.output / CHECKPOINTS)
    try:
        told = TrainResult.load(output).steps
    except (OSError, ValueError, KeyError, TypeError):  # there are none, or not whole
        told = 0
    if last is None:
        found = f"output {output} holds the results of {told} steps, and no checkpoint to go on from"
        return f"{found}; begin in another output" if told else None
    state = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))
    step = state["global_step"]
    done = step >= config.steps if config.steps else (state["epoch"] or 0) >= config.epochs
    if done and told == step:  # else the results are of an earlier end
        return f"output {output} holds the results of {told} steps; ask for more"
    if config.steps and step > config.steps:
        return past(step, config.steps)
    waited = since_best(state["log_history"], state["best_global_step"])
    if told == step and config.patience and waited >= config.patience:
        return f"patience ended the run in output {output} after {told} steps; ask for more patience"
    return None


def _changed(config: TrainConfig) -> Iterator[str]:
    """Options that have to be those with which the run began."""
    saved = TrainConfig(**recipe.load_recipe(config.output / RECIPE))
    before, now = recipe.entries(saved), recipe.entries(config)
    for option, why in _fixed(config, saved).items():
        if comparable(before[option]) != comparable(now[option]):
            yield (
                f"{option} was {_told(before[option])} when the run began, is {_told(now[option])}: {why}; leave it as "
                "it was, or begin in another output"
            )


def _fixed(config: TrainConfig, saved: TrainConfig) -> dict[str, str]:
    """Names of such options, each with the reason."""
    fixed = {
        "method": "it cannot go on with what the other trained",
        "optimizer": "it cannot go on with the other's state",
    }
    if saved.keep_best and config.keep_best:
        fixed |= dict.fromkeys(MEASURED_ON, "losses on other data cannot tell which step was the best")
    if config.method in ("dora", "lora") and (saved.lora_plus_ratio == 1) != (config.lora_plus_ratio == 1):
        fixed["lora_plus_ratio"] = "only where it is not 1 has B a state of its own in the optimizer"
    if (saved.start_from is None) != (config.start_from is None):
        return fixed | {"start_from": "what the held-out loss is compared with would be another"}
    if config.method == saved.method and config.is_adapter and config.start_from is None:  # whose file has them
        vain = LOW_RANK if config.method == "magnitude" else ()
        fixed |= {name: "the checkpoint's adapter is another" for name in OF_THE_ADAPTER if name not in vain}
    return fixed


def _told(value: Any) -> str:
    return recipe.as_toml(value).strip('"')
