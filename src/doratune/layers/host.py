"""Modules that compute with several weights of their own and call no layers: each weight is a part to be adapted.

A wrapped part would do nothing, as nobody calls it. So a host stands in the module's place and computes with what
adapters make of the parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from doratune.errors import AdapterError
from doratune.layers.adapted import AdaptedLayer
from doratune.layers.holder import StandIn, base_attribute
from doratune.layers.loading import accept_plain_keys_below


class Part(nn.Module):
    """One weight of a module, seen as a layer; it shares the module's parameters."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple: the module is not a part of its own part
        self.name = name
        self.merged: tuple[Tensor, Tensor | None] | None = None
        """Weight and bias once an adapter is merged, as the module stores them."""

    @property
    def owner(self) -> Any:
        """The module that this is a part of."""
        return self._owner[0]


class Host(StandIn):
    """Stands in the place of a module with parts."""

    def __init__(self, owner: nn.Module, parts: Mapping[str, Part]) -> None:
        super().__init__(owner)
        self._projections = nn.ModuleDict(parts)
        self.register_load_state_dict_pre_hook(accept_plain_keys_below)

    def active_layers(self) -> Iterator[tuple[str, AdaptedLayer]]:
        """The parts that an adapter changes at present."""
        for name, layer in self._projections.items():
            if isinstance(layer, AdaptedLayer) and layer.enabled and layer.active is not None:
                yield name, layer

    def adapted(self) -> bool:
        """True if a part holds an adapter, active or not."""
        return any(isinstance(layer, AdaptedLayer) for layer in self._projections.values())

    def merged(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Weights and biases of the parts that are merged already."""
        parts = self._projections.items()
        return {name: p.merged for name, p in parts if isinstance(p, Part) and p.merged is not None}

    def plain(self) -> nn.Module:
        """The module with the weights its parts have now: itself, or a changed copy after merging."""
        raise AssertionError(f"{type(self).__name__} must define plain")

    def _replicate_for_data_parallel(self) -> Host:
        if self.adapted():
            raise AdapterError(
                f"nn.DataParallel: adapted parts of a {type(self.base_layer).__name__} share its weights, which its "
                "replicas would take from the first device; use DistributedDataParallel (torchrun)"
            )
        replica: Host = super()._replicate_for_data_parallel()
        return replica

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            paths = [layer.path for _, layer in self.active_layers()]
            return base_attribute(self, name, paths[0] if paths else None)
