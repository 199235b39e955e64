"""What a DoRA adapter loses as a plain LoRA adapter: `python examples/dora_as_lora.py quickstart-output/dora-r16`.

Takes a run of `doratune train` on text, and measures perplexity on what that run held out: of the base, the adapter,
the merged model, LoRA adapters of several ranks as `doratune convert` makes them, and the one that PEFT's conversion
makes, which leaves the magnitudes out. It needs peft besides what the quickstart needs.
"""

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import doratune as dt
from doratune.train import TrainConfig, load_recipe
from doratune.train.models import load_base
from doratune.train.tasks import task_of


@dataclass
class Options:
    """Measure what a DoRA adapter loses as a plain LoRA adapter."""

    run: tyro.conf.Positional[Path]
    """Folder of a run of `doratune train` on text."""
    ranks: tuple[int, ...] = (8, 16, 32, 64)
    """Of the LoRA adapters."""
    peft_rank: int = 16
    """Of the one from PEFT."""


def main(options: Options) -> None:
    """All of it, from top to bottom."""
    adapter = options.run / "adapter"
    config = TrainConfig(**load_recipe(options.run / "recipe.toml"))
    texts = task_of(config.task).prepare(config, lambda line: None).held_out
    table = Table(box=SIMPLE_HEAD, title=f"{options.run}: {len(texts)} texts held out")
    for name in ("", "kept", "perplexity"):
        table.add_column(name, justify="right" if name else "left")

    model = dt.load_adapter(load_base(adapter), adapter)
    with dt.disabled(model):
        table.add_row("base", "", f"{perplexity(model, texts):.3f}")
    table.add_row("adapter", "", f"{perplexity(model, texts):.3f}")
    for rank in options.ranks:
        kept = dt.convert_to_lora(model, rank).kept
        table.add_row(f"LoRA, rank {rank}", f"{kept:.1%}", f"{perplexity(model, texts):.3f}")
        dt.delete_adapter(model, "lora")
        dt.set_adapter(model, "default")
    table.add_row("merged", "", f"{perplexity(dt.merge(model), texts):.3f}")
    with tempfile.TemporaryDirectory() as folder:
        theirs = peft.PeftModel.from_pretrained(load_base(adapter), str(adapter))
        peft.save_as_lora(folder, theirs, options.peft_rank)
        model = dt.load_adapter(load_base(adapter), folder)
    table.add_row(f"PEFT's LoRA, rank {options.peft_rank}", "", f"{perplexity(model, texts):.3f}")
    Console().print(table)


@torch.no_grad()
def perplexity(model: Any, texts: Any) -> float:
    """Of all tokens that the run took a loss on."""
    total, tokens = 0.0, 0
    for text in texts:
        labels = torch.tensor(text.get("labels", text["input_ids"]))[None]
        number = int((labels[:, 1:] >= 0).sum())
        total += number * float(model(input_ids=torch.tensor(text["input_ids"])[None], labels=labels).loss)
        tokens += number
    return math.exp(total / tokens)


if __name__ == "__main__":
    main(tyro.cli(Options))
