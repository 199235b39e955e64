"""``doratune bench``: what DoRA and LoRA cost on a model of the user's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from doratune.cli.common import at_least, check
from doratune.config import AdapterConfig
from doratune.files import read_config, reading_adapter
from doratune.hub import adapter_folder
from doratune.train.choices import Dtype
from doratune.train.models import check_context, choose_dtype, load_model
from doratune.train.quiet import quiet_libraries

if TYPE_CHECKING:
    from doratune.study.race import Timing
    from doratune.study.speed import Cost


@dataclass
class Bench:
    """Measure on this machine what LoRA and DoRA cost on a causal language model, next to the frozen model.

    Contestants take turns; ratios are medians of pairs. Nothing is trained or written.
    """

    model: tyro.conf.Positional[str]
    """Folder of a model, or name on the model hub."""
    adapter: Path | None = None
    """Folder of an adapter for this model, or its name on the hub, to be measured, too."""
    rank: int = AdapterConfig.rank
    """Of the adapters that are compared; they are on all linear layers but the output head."""
    dropout: float = AdapterConfig.dropout
    """Of the adapters that are compared."""
    tokens: int = 512
    """Length of a sequence."""
    batch_size: int = 1
    """Sequences in a training step."""
    seconds: float = 20.0
    """For each of the two races: training steps and decode steps."""
    dtype: Dtype = "auto"
    """Of the base weights; auto: bfloat16 on a GPU that has it, else float32, as in training."""
    json: bool = False
    """Print the result as JSON."""

    def problems(self) -> Iterator[str]:
        """Options that cannot work."""
        yield from at_least(self, tokens=2, batch_size=1)
        if not self.seconds > 0:
            yield f"seconds must be above 0; found {self.seconds}"
        if self.rank < 1:
            yield f"rank must be at least 1, or LoRA has nothing; found {self.rank}"
        if not 0 <= self.dropout < 1:
            yield f"dropout must be at least 0 and below 1; found {self.dropout}"
        if self.adapter is not None and not self.adapter.is_dir():
            yield f"adapter {self.adapter}: no such folder"


def run(options: Bench) -> int:
    """Load, race, print."""
    if options.adapter is not None:
        options = dataclasses.replace(options, adapter=adapter_folder(options.adapter))
    check(options.problems())
    from doratune.study.speed import measure_speed

    if options.adapter is not None:
        with reading_adapter(options.adapter):
            read_config(options.adapter)  # before a large model is loaded
    quiet_libraries()
    model = load_model(options.model, choose_dtype(options.dtype))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    check_context(model.config, options.model, options.tokens)
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch_size, options.tokens)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator).to(model.device)
    config = AdapterConfig(rank=options.rank, alpha=2.0 * options.rank, dropout=options.dropout)
    with Progress(console=Console(stderr=True, emoji=False), transient=True) as progress:
        tasks: dict[str, Any] = {}

        def watch(what: str, share: float) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=1.0)
            progress.update(tasks[what], completed=min(share, 1.0))

        costs = measure_speed(model, config, ids, adapter=options.adapter, seconds=options.seconds, watch=watch)
    about = {
        "model": options.model,
        "rank": options.rank,
        "dropout": options.dropout,
        "tokens": options.tokens,
        "batch_size": options.batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }
    if options.json:
        print(json.dumps({**about, "costs": [asdict(cost) for cost in costs]}))
    else:
        Console(emoji=False).print(_table(costs, about))
    return 0


def _table(costs: list[Cost], about: dict[str, Any]) -> Table:
    title = f"{about['batch_size']} x {about['tokens']} tokens, rank {about['rank']}, {about['dtype']}, "
    title += f"{about['threads']} CPU threads" if about["device"] == "cpu" else about["device"]
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.caption = "x frozen: median of paired ratios with its 95 % interval; saved: kept for the backward pass"
    for name in ("", "step ms", "x frozen", "saved MB", "decode ms", "x frozen"):
        table.add_column(name, justify="right" if name else "left", overflow="fold")
    for cost in costs:
        table.add_row(cost.name, *_cells(cost.step), f"{cost.saved / 1e6:,.1f}", *_cells(cost.decode))
    return table


def _cells(timing: Timing | None) -> tuple[str, str]:
    if timing is None:
        return "-", "-"
    ratio, low, high = map(_digits, (timing.ratio, timing.low, timing.high))
    return f"{timing.milliseconds:,.1f}", f"{ratio} ({low}..{high})"


def _digits(ratio: float) -> str:
    """As many decimals as keep the table within 80 columns on a machine whose times jump."""
    return f"{ratio:.{2 if ratio < 10 else 1 if ratio < 100 else 0}f}"
