"""What every module that holds adapters has in common: names, one of them active, all of them switchable."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

from doratune.layers import input_gradients, running_statistics
from doratune.layers.bypass import UnreadWeight

M = TypeVar("M", bound=nn.Module)

READ = (
    *("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    *("gate_up_proj", "up_proj", "down_proj"),  # of experts
)
"""Attributes that others may compute with, past an adapter."""


def base_attribute(holder: nn.Module, name: str, changed: str | None) -> Any:
    """An attribute of the holder's base layer, shown as the holder's own.

    Args:
        changed: the path of the layer whose weight an adapter changes at present; it cannot be computed with.
    """
    base = holder.__dict__.get("_modules", {}).get("base_layer")
    if base is None or name.startswith("__"):
        raise AttributeError(f"{type(holder).__name__} has no attribute {name!r}")
    value = getattr(base, name)
    if changed is not None and name in READ and type(value) in (Tensor, nn.Parameter):
        return UnreadWeight.of(value, changed)
    return value


class StandIn(nn.Module):
    """Stands in the place of ``base_layer``, keeps it, and (each kind in its way) shows its attributes as its own."""

    base_layer: nn.Module

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.training = base.training


class AdapterHolder(StandIn):
    """A stand-in that holds adapters."""

    def __init__(self, base: nn.Module, path: str) -> None:
        super().__init__(base)
        self.path = path
        self.active: str | None = None
        self.enabled = True
        self.places: dict[str, int] = {}
        """Where each adapter stands among all of the model's, in the order they were attached."""
        self.waiting: set[str] = set()
        """Adapters attached while the base had no data (meta device), to get their start values once it has."""
        self.load_prefix = ""
        self.loaded: set[str] = set()
        """Parts of the base that ``load_state_dict`` has filled."""

    def adapter_names(self) -> list[str]:
        """Names of the adapters that this module holds."""
        raise AssertionError("holders define adapter_names")

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Parameters that belong to one adapter."""
        raise AssertionError("holders define adapter_parameters")

    def trains(self, name: str) -> bool:
        """Whether the adapter was attached to be trained."""
        raise AssertionError("holders define trains")

    def remove(self, name: str) -> None:
        """Forget one adapter; whoever keeps more of it drops that first."""
        self.waiting.discard(name)
        self.places.pop(name, None)
        if self.active == name:
            self.activate(None)

    def activate(self, name: str | None) -> None:
        """Make one adapter the active one; only its parameters get gradients."""
        self.active = name if name in self.adapter_names() else None
        for other in self.adapter_names():
            chosen = other == self.active and self.trains(other)
            for parameter in self.adapter_parameters(other):
                parameter.requires_grad_(chosen)
                if not chosen:
                    # Or else an optimiser's next step would still move it.
                    parameter.grad = None


def plain(module: nn.Module) -> nn.Module:
    """The module that adapters were attached to, if this one stands in its place."""
    while isinstance(module, StandIn):
        module = module.base_layer
    return module


def plain_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of a module under the names they had before adapters, without the adapters' own."""
    module = plain(module)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter
    for name, child in module._modules.items():
        if child is not None:
            yield from plain_parameters(child, f"{prefix}{name}.")


def shallow_copy(module: M) -> M:
    """A copy whose parameters and parts, the same at first, can be replaced without touching the original."""
    new = copy.copy(module)
    new._parameters, new._modules = dict(module._parameters), dict(module._modules)
    return new


def plain_copy(module: nn.Module, shared: Iterable[nn.Parameter] = ()) -> nn.Module:
    """A copy of a module without adapters; the parameters in ``shared`` are not copied."""
    module = plain(module)
    kept: dict[int, Any] = {id(p): p for p in shared}
    for part in module.modules():  # these hooks refer to the whole model, which would be copied with them
        kept.update({id(hook): hook for hook in input_gradients.hooks_of(part).values()})
    clone = copy.deepcopy(module, kept)
    for part in list(clone.modules()):
        running_statistics.release(part)
        for name, child in part._modules.items():
            if child is not None:
                part._modules[name] = plain(child)
    return clone
