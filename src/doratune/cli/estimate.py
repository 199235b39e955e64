"""``doratune estimate``: what a training step needs, from a model's configuration alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from doratune.cli.common import at_least, check, say
from doratune.config import AdapterConfig, Method
from doratune.train.choices import Quantize
from doratune.train.models import check_context, load_config
from doratune.train.quiet import quiet_libraries

if TYPE_CHECKING:
    from doratune.study.estimate import Estimate

ASSUMPTIONS = (
    "adapters are in float32, with Adam: 16 bytes a number",
    "activations and arithmetic of all layers are the second one's; fused attention; loss on all tokens at once",
    "devices work on different sequences; FSDP2 holds two whole layers at a time, adapters are whole everywhere",
    "with quantisation one weight at a time is made whole; what stays of the allocator's own comes on top (5 to 20 %)",
)


@dataclass
class EstimateOptions:
    """Estimate memory and arithmetic of a training step of a causal language model, from its config.json alone.

    No weights are loaded. Numbers are for one device.
    """

    model: tyro.conf.Positional[str]
    """Folder with a config.json, or name on the model hub."""
    method: Method = AdapterConfig.method
    """dora or lora."""
    rank: int = AdapterConfig.rank
    """Of the adapter; 0: magnitudes only."""
    targets: tuple[str, ...] | str = AdapterConfig.targets  # type: ignore[assignment]
    """As in train: all linear layers but the output head, names (gate_up_proj and down_proj of experts, too), or a
    regular expression."""
    tokens: int = 4096
    """Length of a sequence."""
    batch_size: int = 1
    """Sequences in a forward pass on one device."""
    devices: int = 1
    """That work on different sequences."""
    fsdp: bool = False
    """Spread the base over the devices (FSDP2); else each has a copy (DDP)."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of weights and arithmetic."""
    quantize: Quantize | None = None
    """As in train."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    json: bool = False
    """Print the result as JSON."""

    def problems(self) -> Iterator[str]:
        """Options that cannot work."""
        yield from at_least(self, tokens=2, batch_size=1, devices=1, rank=0 if self.method == "dora" else 1)
        if self.fsdp and self.quantize:
            yield f"fsdp does not spread quantised weights ({self.quantize}); leave out one of the two"
        if self.fsdp and self.devices == 1:
            yield "fsdp spreads a model over devices, and this is one: --devices N"


def run(options: EstimateOptions) -> int:
    """Estimate and print."""
    check(options.problems())
    from doratune.study.estimate import estimate

    quiet_libraries()
    config = load_config(options.model)
    check_context(config, options.model, options.tokens)
    result = estimate(
        config,
        AdapterConfig(
            method=options.method, rank=options.rank, alpha=2.0 * max(1, options.rank), targets=options.targets
        ),
        tokens=options.tokens,
        batch_size=options.batch_size,
        devices=options.devices,
        fsdp=options.fsdp,
        dtype=getattr(torch, options.dtype),
        quantize=options.quantize,
        gradient_checkpointing=options.gradient_checkpointing,
    )
    if options.json:
        asked = {name: value for name, value in asdict(options).items() if name != "json"}
        print(json.dumps({**asked, **asdict(result), "total": result.total, "assumptions": ASSUMPTIONS}))
        return 0
    console = Console(emoji=False)
    console.print(_table(options, result))
    for line in ASSUMPTIONS:
        say(console, f"assumed: {line}")
    return 0


def _table(options: EstimateOptions, result: Estimate) -> Table:
    shared = "FSDP2" if options.fsdp else "DDP"
    way = "" if options.devices == 1 else f" on each of {options.devices} devices ({shared})"
    title = f"{options.method}, rank {options.rank}: a step of {options.batch_size} x {options.tokens} tokens{way}"
    table = Table(title=title, show_header=False)
    trained = result.adapter_parameters
    table.add_row("parameters", f"{result.parameters:,}, trained {trained:,} ({trained / result.parameters:.3%})")
    magnitudes = result.magnitude_parameters
    table.add_row("of these magnitudes", f"{magnitudes:,} ({magnitudes / result.parameters:.3%} of all)")
    for name in ("weights", "gathered", "adapters", "gradients", "optimizer", "activations", "total"):
        table.add_row(name, f"{getattr(result, name) / 2**30:,.2f} GiB", end_section=name == "activations")
    table.add_row("arithmetic", f"{result.operations / 1e12:,.1f} TFLOP a step, {result.dora_share:.2%} of it DoRA's")
    if options.devices > 1:
        norm = f"{result.norm_communication / 1e6:,.1f} MB of it DoRA's"
        table.add_row("received", f"{result.communication / 1e9:,.2f} GB a step, {norm}")
    return table
