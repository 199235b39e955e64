"""Which layers of a PEFT model doratune serves, which PEFT computes, and why."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from doratune.interop.peft.adapter import servable_adapter
from doratune.interop.peft.service import ATTRIBUTE, State


@dataclass(frozen=True)
class LayerReport:
    """One LoRA layer of PEFT's, as it is now."""

    path: str
    kind: str
    """Kind of the layer, or the name of PEFT's class where doratune has none for it."""
    served: bool
    reason: str
    """Served: which path runs, and why not a faster one. Not served: why PEFT computes it."""


@dataclass(frozen=True)
class Report:
    """All LoRA layers of a model; ``print`` it, or read its fields."""

    layers: tuple[LayerReport, ...]

    @property
    def served(self) -> list[LayerReport]:
        """Layers that doratune computes."""
        return [layer for layer in self.layers if layer.served]

    @property
    def left(self) -> list[LayerReport]:
        """Layers that PEFT computes."""
        return [layer for layer in self.layers if not layer.served]

    @property
    def headline(self) -> str:
        """The report in one line."""
        return f"{len(self.served)} of {len(self.layers)} LoRA layers served by doratune, {len(self.left)} left to PEFT"

    def __str__(self) -> str:
        groups = Counter((not x.served, x.path.rpartition(".")[2], x.kind, x.reason) for x in self.layers)
        lines = [self.headline]
        for (left, name, kind, reason), count in sorted(groups.items()):
            lines.append(f"  {'PEFT' if left else 'doratune':8s}  {count:4d} x {name} ({kind}): {reason}")
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """Which LoRA layers of a PEFT model are served at this moment, in its present mode and with its active adapter.

    Single calls may still be PEFT's: those with ``adapter_names`` for mixed batches.
    """
    return Report(tuple(_layer_report(path, layer) for path, layer in layers_of(model)))


def layers_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's LoRA layers in a model, with their paths."""
    tuners = sys.modules.get("peft.tuners.lora.layer")
    for path, module in model.named_modules():
        if tuners is not None and isinstance(module, tuners.LoraLayer):
            yield path, module


def _layer_report(path: str, layer: Any) -> LayerReport:
    name = type(layer).__name__
    if not State.serves(type(layer)):
        switched = State.installed is not None or len(State.served)
        reason = f"PEFT's {name} has no forward that doratune serves" if switched else "not accelerated"
        return LayerReport(path, name, False, reason)
    if getattr(layer, ATTRIBUTE, None) is None and State.installed is None:
        return LayerReport(path, name, False, "not accelerated")
    if "forward" in layer.__dict__ and not _leads_here(layer):
        return LayerReport(path, name, False, "its forward was replaced on the instance before")
    adapter = servable_adapter(layer)
    if isinstance(adapter, str):
        return LayerReport(path, name, False, adapter)
    way, why = adapter.kind.explain(adapter.base)
    return LayerReport(path, adapter.kind.name, True, f"{way} ({why})" if why else way)


def _leads_here(layer: Any) -> bool:
    """Whether accelerate's hook, set after ``install``, goes on to our forward."""
    return State.is_ours(getattr(layer.__dict__.get("_old_forward"), "__func__", None))
