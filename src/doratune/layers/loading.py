"""Loading state dicts into adapted models: of the adapted or of the plain model, in one piece or in several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from doratune.layers.holder import plain_parameters
from doratune.layers.weights import is_dtensor

if TYPE_CHECKING:
    from doratune.layers.adapted import AdaptedLayer
    from doratune.layers.saved import SavedModule


def accept_plain_keys(layer: AdaptedLayer, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Let a checkpoint of the plain model fill the base: ``<path>.weight`` is ``<path>.base_layer.weight``."""
    layer.load_prefix = prefix
    for name in _base_names(layer):
        if prefix + name in state:
            state.setdefault(prefix + "base_layer." + name, state.pop(prefix + name))
        if prefix + "base_layer." + name in state:
            layer.loaded.add(name)


def accept_plain_keys_below(holder: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """The same for a holder of a whole module: what belongs to none of the holder's own parts is the base's."""
    for key in [key for key in state if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        if name.partition(".")[0] not in holder._modules:
            state.setdefault(f"{prefix}base_layer.{name}", state.pop(key))


def _base_names(layer: AdaptedLayer) -> set[str]:
    return {n for n, _ in (*layer.base_layer.named_parameters(), *layer.base_layer.named_buffers())}


def after_load(layer: AdaptedLayer, incompatible: Any) -> None:
    """Look at what was loaded: adapters that got nothing start fresh once the base is whole."""
    layer.cache.clear()
    if layer.waiting:
        own = {f"{layer.load_prefix}{n}" for n, _ in layer.named_parameters() if not n.startswith("base_layer.")}
        absent = own.intersection(incompatible.missing_keys)
        if absent and layer.loaded < _base_names(layer):
            return  # the base comes in pieces, and some are still to come
        if absent:
            # A base that had no data before was filled by a checkpoint without adapters: they start fresh.
            layer.initialise()
        else:
            layer.waiting.clear()
        for key in absent:
            incompatible.missing_keys.remove(key)
    for name in layer.adapters:
        if f"{layer.load_prefix}magnitude.{name}" in incompatible.missing_keys and _is_fresh(layer, name):
            layer.reset_magnitude(name)  # or else it would change a base that came after it
        layer.decide(name)


def _is_fresh(layer: AdaptedLayer, name: str) -> bool:
    """Whether an adapter is as it was attached."""
    m, started = layer.magnitude[name], layer.started.get(name)
    if started is None or name in layer.waiting or m.is_meta or is_dtensor(m):
        return False
    if name in layer.lora_A and layer.lora_A[name].any() and layer.lora_B[name].any():
        return False
    return torch.equal(m, started.to(m.device))


def note_loaded(saved: SavedModule, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Note what a state dict fills of a module that adapters have copies of, and of the copies."""
    saved.load_prefix, base = prefix, f"{prefix}base_layer."
    # Layers inside may be adapted, too, and their weights a level deeper.
    saved.loaded |= {key.removeprefix(base).replace("base_layer.", "") for key in state if key.startswith(base)}
    for name in saved.waiting:
        if all(f"{prefix}copies.{name}.{inner}" in state for inner in saved.trained[name]):
            saved.filled.add(name)


def fill_copies(saved: SavedModule, incompatible: Any) -> None:
    """Fill the copies as soon as the base is whole: an optimiser may be made before the first forward."""
    if saved.waiting and saved.loaded.issuperset(name for name, _ in plain_parameters(saved.base_layer)):
        saved.initialise()
        own = f"{saved.load_prefix}copies."
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.startswith(own)]
