"""``doratune train``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from doratune.cli.common import check, say
from doratune.distributed import leave_group
from doratune.train.config import TrainConfig
from doratune.train.output import CURVES, METRICS, RECIPE, RESULTS
from doratune.train.processes import is_first_asked
from doratune.train.quiet import quiet_libraries
from doratune.train.recipe import explain, find_recipe, load_recipe
from doratune.train.without_effect import without_effect


@dataclass
class _RecipeFlag:
    recipe: str | None = None


def from_recipe(arguments: Sequence[str]) -> TrainConfig | None:
    """The recipe named among the arguments as defaults for the flags; None if there is none."""
    if "train" not in arguments or not any(word.startswith("--recipe") for word in arguments):
        return None
    words = [word for word in arguments if word not in ("-h", "--help")]
    flag, _ = tyro.cli(_RecipeFlag, args=words, return_unknown_args=True, add_help=False)
    if flag.recipe is None:
        return None
    required: dict[str, Any] = {"model": tyro.MISSING, "data": tyro.MISSING}
    if "--print-recipe" in arguments:  # shows what is not named as empty
        required = {"model": "", "data": ()}
    return TrainConfig(**{**required, **load_recipe(find_recipe(flag.recipe)), "recipe": flag.recipe})


def flags_among(arguments: Sequence[str]) -> set[str]:
    """Names of the options that are typed, as fields have them."""
    typed = (word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--"))
    return {name.removeprefix("no_") for name in typed}


def run(config: TrainConfig, flags: Collection[str] = ()) -> int:
    """Train, and print results and how to go on; flags are the options that were typed."""
    if config.print_recipe:
        print(explain(config, flags))
        return 0
    from doratune.train.run import problems, train

    check([*problems(config), *without_effect(config, flags)])  # before libraries are imported, which takes seconds
    quiet_libraries()
    result = train(config, Console(stderr=True, emoji=False))
    # After an error the process just ends, and torchrun ends the others: leaving waits for those that are in a
    # collective, with the error not told yet.
    leave_group()
    if not is_first_asked():
        return 0
    out = Console(emoji=False)
    out.print(result.table())
    if result.prompt is not None:
        for name, sample in (("before", result.sample_before), ("after", result.sample_after)):
            out.print(f"[bold]{name}:[/bold]", end=" ")
            say(out, f"{result.prompt}{sample}")
    written = [f"{Path(result.adapter).name}/", METRICS, CURVES, RESULTS, RECIPE]
    say(out, f"Written to {config.output}: {', '.join(written)}")
    say(out, result.next_steps())
    return 0
