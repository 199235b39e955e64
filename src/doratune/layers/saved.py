"""Modules trained whole with an adapter (``modules_to_save``), and biases of layers that are not adapted.

Every adapter has a copy of its own; the original stays as it was, so that switching and disabling work as for layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from doratune.errors import AdapterError
from doratune.layers.holder import AdapterHolder, plain, plain_copy, plain_parameters, shallow_copy
from doratune.layers.loading import accept_plain_keys_below, fill_copies, note_loaded
from doratune.layers.weights import is_dtensor


class OwnBiases(nn.Module):
    """An adapter's copies of a module's own biases; the module runs with them, and with what is adapted inside it."""

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        super().__init__()
        for name in names:
            owner, _, own = name.rpartition(".")
            if owner and owner not in self._modules:
                self.add_module(owner, nn.Module())
            bias = nn.Parameter(module.get_parameter(name).detach().clone())
            self.get_submodule(owner).register_parameter(own, bias)


class SavedModule(AdapterHolder):
    """Runs the active adapter's copy of a module, or the original if none is active."""

    def __init__(self, base: nn.Module, path: str) -> None:
        super().__init__(base, path)
        self.copies = nn.ModuleDict()
        self.trained: dict[str, list[str]] = {}
        """For each adapter the names of the parameters that are its own: all of the module's, or its biases."""
        self.trainable: dict[str, bool] = {}
        self.filled: set[str] = set()
        """Waiting adapters whose own parameters a state dict has filled."""
        self.register_load_state_dict_pre_hook(accept_plain_keys_below)
        self.register_load_state_dict_pre_hook(note_loaded)
        self.register_load_state_dict_post_hook(fill_copies)

    def add(self, name: str, parameters: list[str], trainable: bool = True) -> None:
        """Add an adapter's copy of the named parameters: the whole module, or biases for the original to run with."""
        is_whole = len(parameters) == sum(1 for _ in plain_parameters(self.base_layer))
        clone = plain_copy(self.base_layer) if is_whole else OwnBiases(plain(self.base_layer), parameters)
        clone.train(self.training)
        self.copies[name] = clone
        self.trained[name] = parameters
        self.trainable[name] = trainable
        if any(p.is_meta for p in self.base_layer.parameters()):
            self.waiting.add(name)

    @torch.no_grad()
    def initialise(self) -> None:
        """Fill the copies that still wait for a base with data."""
        base = dict(plain_parameters(self.base_layer))
        if any(p.is_meta for p in base.values()):
            return
        for name in sorted(self.waiting):
            clone = self.copies[name]
            for inner, parameter in list(clone.named_parameters()):
                if parameter.is_meta and not is_dtensor(parameter):
                    owner, _, own = inner.rpartition(".")
                    new = nn.Parameter(base[inner].clone(), parameter.requires_grad)
                    clone.get_submodule(owner)._parameters[own] = new
                elif name not in self.filled:
                    parameter.copy_(base[inner])
            if isinstance(clone, OwnBiases) or name in self.filled:
                continue  # it has no buffers, or was given them
            for inner, buffer in plain_copy(self.base_layer, base.values()).named_buffers():
                owner, _, own = inner.rpartition(".")
                clone.get_submodule(owner)._buffers[own] = buffer
        self.waiting.clear()
        self.filled.clear()

    def adapter_names(self) -> list[str]:
        return list(self.copies)

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        return (p for n, p in self.copies[name].named_parameters() if n in self.trained[name])

    def trains(self, name: str) -> bool:
        return self.trainable[name]

    def remove(self, name: str) -> None:
        if name in self.copies:
            del self.copies[name], self.trained[name], self.trainable[name]
            self.filled.discard(name)
        super().remove(name)

    def chosen(self) -> nn.Module:
        """The module whose turn it is."""
        if not self.enabled or self.active is None or self.own_biases():
            return self.base_layer
        return self.copies[self.active]

    def own_biases(self) -> dict[str, Tensor]:
        """The active adapter's biases for the original to run with; empty where the adapter has a whole copy."""
        clone = self.copies[self.active] if self.enabled and self.active is not None else None
        return dict(clone.named_parameters()) if isinstance(clone, OwnBiases) else {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The chosen module's output."""
        if self.waiting:
            self._initialise_late()
        biases = self.own_biases()
        if biases:
            inside = self._path_to_plain()
            own = {inside + name: bias for name, bias in biases.items()}
            return functional_call(self.base_layer, own, args, kwargs, tie_weights=False)
        return self.chosen()(*args, **kwargs)

    def _path_to_plain(self) -> str:
        """Where in ``base_layer`` the biases are: the projections of an attention may be another adapter's."""
        path, module = "", self.base_layer
        while module is not plain(self.base_layer):
            path, module = f"{path}base_layer.", module.base_layer  # type: ignore[assignment]
        return path

    def _initialise_late(self) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise AdapterError(
                f"{self.path}: the adapter's copy has no start values, and within a forward of several processes it "
                "cannot be given any; once the base has its weights, call doratune.distributed.initialise(model)"
            )
        self.initialise()

    def merged(self) -> nn.Module:
        """The chosen module, to take the holder's place."""
        module = self.chosen()
        for name, bias in self.own_biases().items():
            owner, _, own = name.rpartition(".")
            setattr(plain(module).get_submodule(owner), own, nn.Parameter(bias.detach()))
        return module

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name.startswith("__") or "copies" not in self.__dict__.get("_modules", {}):
                raise
            biases = self.own_biases()
            return biases[name] if name in biases else _with_biases(getattr(self.chosen(), name), name, biases)


def _with_biases(part: Any, name: str, biases: dict[str, Tensor]) -> Any:
    """A part of the module as others see it (``nn.TransformerEncoderLayer`` computes with ``out_proj.bias`` itself)."""
    own = {key.removeprefix(f"{name}."): bias for key, bias in biases.items() if key.startswith(f"{name}.")}
    if own:
        part = shallow_copy(part)
        part._parameters.update(own)
    return part
