"""Modules trained whole with an adapter (``modules_to_save``), and biases of layers that are not adapted.

Every adapter has a copy of its own; the original stays as it was, so that switching and disabling work as for layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from doratune.layers import running_statistics
from doratune.layers.holder import AdapterHolder, plain_copy, plain_parameters
from doratune.layers.loading import accept_plain_keys_below


class SavedModule(AdapterHolder):
    """Runs the active adapter's copy of a module, or the original if none is active."""

    def __init__(self, base: nn.Module, path: str) -> None:
        super().__init__(base, path)
        self.copies = nn.ModuleDict()
        self.trained: dict[str, list[str]] = {}
        """For each adapter the names of the parameters that are its own; the rest is shared with the original."""
        self.trainable: dict[str, bool] = {}
        self.register_load_state_dict_pre_hook(accept_plain_keys_below)

    def add(self, name: str, parameters: list[str], trainable: bool = True) -> None:
        """Add an adapter's copy, in which the named parameters are its own."""
        clone = plain_copy(self.base_layer, [p for n, p in plain_parameters(self.base_layer) if n not in parameters])
        clone.train(self.training)
        if len(parameters) < len(list(plain_parameters(self.base_layer))):
            for part in clone.modules():  # biases only are in the file
                running_statistics.hold(part)
        self.copies[name] = clone
        self.trained[name] = parameters
        self.trainable[name] = trainable

    def adapter_names(self) -> list[str]:
        return list(self.copies)

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        return (p for n, p in self.copies[name].named_parameters() if n in self.trained[name])

    def trains(self, name: str) -> bool:
        return self.trainable[name]

    def remove(self, name: str) -> None:
        if name in self.copies:
            del self.copies[name], self.trained[name], self.trainable[name]
        if self.active == name:
            self.activate(None)

    def chosen(self) -> nn.Module:
        """The module whose turn it is."""
        return self.copies[self.active] if self.enabled and self.active is not None else self.base_layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The chosen module's output."""
        return self.chosen()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name.startswith("__") or "copies" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.chosen(), name)
