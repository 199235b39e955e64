"""``doratune evaluate``: loss, perplexity and accuracy of adapters on other data."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.table import Table

from doratune.cli.common import say
from doratune.distributed import leave_group
from doratune.hub import adapter_folder
from doratune.inference.measuring import Measuring
from doratune.study.page import without_nan
from doratune.train.processes import is_first_asked
from doratune.train.quiet import quiet_libraries

if TYPE_CHECKING:
    from doratune.inference.evaluation import Evaluation


@dataclass
class Evaluate:
    """Measure adapters on other data: loss and perplexity of language models, beside their base; loss and accuracy of
    classifiers.

    On a run's held-out data it gives what the run measured.
    """

    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE ...")]
    """What to measure on: files, folders and data sets, as in training. All of it is measured on."""
    adapters: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[ADAPTER ...]")] = ()
    """Adapters, as written by doratune or PEFT (folders, or names on the hub), or the folder of a whole model; none:
    --base is measured."""
    base: str | None = None
    """Base model, a folder or hub name; none: the one that the adapters name."""
    measuring: Annotated[Measuring, tyro.conf.OmitArgPrefixes] = field(default_factory=Measuring)
    """How the data are read and measured; none: as in training, else as `doratune train` does by default."""
    json: bool = False
    """Print one JSON object."""


def run(options: Evaluate) -> int:
    """Measure and print."""
    from doratune.inference.evaluation import evaluate

    quiet_libraries()
    status = Console(stderr=True, emoji=False, quiet=not is_first_asked())
    adapters = [str(adapter_folder(name)) for name in options.adapters]
    found = evaluate(adapters, options.data, options.base, options.measuring, status)
    leave_group()
    if not is_first_asked():
        return 0
    if options.json:
        print(json.dumps(without_nan(found.as_json()), ensure_ascii=False))
    else:
        out = Console(emoji=False)
        say(out, f"{', '.join(found.data)}: {found.measured[0].examples:,} {found.example}; loss in {found.unit}")
        out.print(_table(found))
    return 0


def _table(found: Evaluation) -> Table:
    """A row a model."""
    table = Table()
    generates = found.task == "text-generation"
    table.add_column("model", overflow="fold")
    for name in ("loss", *(("perplexity", "tokens") if generates else ("accuracy", found.example))):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found.measured:
        reached, of = (f"{one.perplexity:.2f}", one.tokens) if generates else (f"{one.accuracy:.2%}", one.examples)
        table.add_row(one.name, f"{one.loss:.4f}", reached, f"{of:,}")
    return table
