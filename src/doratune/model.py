"""Adapters on whole models: attach, switch, disable, detach."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from doratune.config import AdapterConfig
from doratune.distributed import is_fully_sharded, is_spread, refuse_unattachable
from doratune.errors import AdapterError
from doratune.layers import AdaptedLayer, AdapterHolder, Host, SavedModule, StandIn
from doratune.layers.holder import plain
from doratune.preparation import freeze, keep_frozen, let_inputs_require_grad, prepare, thaw
from doratune.selection import Selection, select
from doratune.targets import WRAPPER_NAMES, adapted_layers, holders, saved_modules, unwrap


def attach(model: nn.Module, config: AdapterConfig, name: str = "default", *, trainable: bool = True) -> nn.Module:
    """Put a new adapter on a model, in place; it becomes the active one, and everything else is frozen.

    A new adapter changes nothing: the model's output stays as it was, bit for bit (on CUDA with biases up to float32's
    rounding).

    Args:
        model: any module; wrapped ones (DistributedDataParallel, torch.compile) are seen through.
        config: what the adapter is.
        name: under which it can be switched to; letters, digits, ``_`` and ``-``.
        trainable: False freezes the adapter, too.

    Returns:
        The same model.

    Raises:
        AdapterError: listing every problem; the model is then unchanged.
    """
    root = unwrap(model)
    if not isinstance(config, AdapterConfig):
        raise AdapterError(f"config: expected a doratune.AdapterConfig, found a {type(config).__name__}")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise AdapterError(f"adapter name: expected letters, digits, '_' and '-'; found {name!r}")
    if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise AdapterError(f"adapter name: torch's containers cannot hold an entry {name!r}; choose another name")
    if name in adapter_names(root):
        raise AdapterError(f"the model already has an adapter {name!r}; choose another name or delete that one first")
    selection = select(root, config)
    refuse_unattachable(model, selection.layers, config, trainable)
    gathered = is_fully_sharded(root)
    adapted, saved = adapted_layers(root), saved_modules(root)
    place = 1 + max((place for holder in holders(root) for place in holder.places.values()), default=0)
    hosts = _new_hosts(root, selection)
    new: list[AdapterHolder] = []
    # Everything that can fail happens before the model is touched.
    for path, kind in selection.layers.items():
        if path not in adapted:
            adapted[path] = AdaptedLayer(plain(_module_at(root, path, hosts)), kind, path, gathered)
            new.append(adapted[path])
    for path in selection.saved:
        if path not in saved:
            saved[path] = SavedModule(_module_at(root, path, hosts), path)
            new.append(saved[path])
    try:
        for path in selection.layers:
            adapted[path].add(name, config, trainable)
            adapted[path].places[name] = place
        for path, parameters in selection.saved.items():
            saved[path].add(name, parameters, trainable)
            saved[path].places[name] = place
    except BaseException:
        for holder in (*adapted.values(), *saved.values()):
            holder.remove(name)
        raise
    _replace(root, {host.base_layer: host for host in hosts.values()})
    _replace(root, {holder.base_layer: holder for holder in new})
    freeze(root)
    prepare(root)
    set_adapter(root, name)
    return model


def _new_hosts(root: nn.Module, selection: Selection) -> dict[str, Host]:
    """A host for each module whose parts are adapted for the first time."""
    hosts: dict[str, Host] = {}
    for path, kind in selection.layers.items():
        parent = path.rpartition(".")[0]
        if parent in hosts:
            continue
        module = _module_at(root, parent, {}) if parent else root
        while isinstance(module, AdapterHolder):  # its biases are another adapter's
            module = module.base_layer
        host = kind.host(module)
        if isinstance(host, Host):
            hosts[parent] = host
    return hosts


def _module_at(root: nn.Module, path: str, hosts: dict[str, Host]) -> nn.Module:
    """The module at a plain path, looking through wrappers and holders on the way."""
    parent, _, name = path.rpartition(".")
    if parent in hosts:
        return hosts[parent]._projections[name]
    module = root
    for part in path.split("."):
        while True:
            if isinstance(module, Host) and part in module._projections:
                module = module._projections
            elif isinstance(module, StandIn):
                module = module.base_layer
            else:
                wrapped = next((n for n in WRAPPER_NAMES if n in module._modules), None)
                if wrapped is None or part in module._modules:
                    break
                module = module._modules[wrapped]  # type: ignore[assignment]
        module = module._modules[part]  # type: ignore[assignment]
    return module


def _replace(root: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules into every place of some, in one walk over the model: it may have hundreds of them."""
    for parent in list(root.modules()):
        for attribute, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[attribute] = new[child]


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the model's adapters, in the order they were attached."""
    places = {name: place for holder in holders(model) for name, place in holder.places.items()}
    return sorted(places, key=places.__getitem__)


def active_adapter(model: nn.Module) -> str | None:
    """Name of the active adapter, or None."""
    return next((h.active for h in holders(model) if h.active is not None), None)


def _require(model: nn.Module, name: str) -> None:
    names = adapter_names(model)
    if name not in names:
        raise AdapterError(f"the model has no adapter {name!r}; it has {', '.join(names) or 'none'}")


def set_adapter(model: nn.Module, name: str) -> None:
    """Make one adapter the active one. Only its parameters get gradients; optimiser state stays valid.

    Raises:
        AdapterError: if the model has no such adapter.
    """
    _require(model, name)
    for holder in holders(model):
        holder.activate(name)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove one adapter; layers that hold no other become plain again.

    Raises:
        AdapterError: if the model has no such adapter.
    """
    _require(model, name)
    root = unwrap(model)
    for holder in holders(root):
        if name in holder.adapter_names():
            holder.remove(name)
        if not holder.adapter_names():
            unhold(root, holder)
    if not holders(root):
        thaw(root)
    else:
        let_inputs_require_grad(root)  # a hook on a holder went with it


def detach(model: nn.Module) -> nn.Module:
    """Remove all adapters and give back the untouched base model, bit for bit, trainable where it was before."""
    root = unwrap(model)
    for holder in holders(root):
        unhold(root, holder)
    thaw(root)
    return model


def unhold(root: nn.Module, holder: AdapterHolder) -> None:
    """Put a holder's base layer back in its place."""
    _replace(root, {holder: holder.base_layer})
    _replace(root, {m: m.plain() for m in root.modules() if isinstance(m, Host) and not m.adapted()})


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within this context the model is the base model, exactly."""
    before = [(holder, holder.enabled) for holder in holders(model)]
    try:
        for holder, _ in before:
            holder.enabled = False
        yield
    finally:
        for holder, enabled in before:
            holder.enabled = enabled


def base_model(model: nn.Module) -> nn.Module:
    """The base as a model of its own, on the same weights: a reference beside the adapted one, for no more memory.

    TRL's DPO and KTO take it as ``ref_model``. It is frozen and in evaluation mode; what changes the weights of one
    changes those of both.

    Raises:
        AdapterError: if the model has no adapter, or its weights lie in parts on several processes.
    """
    root = unwrap(model)
    if not holders(root):
        raise AdapterError("the model has no adapter: it is itself the base; copy it, or attach an adapter first")
    if is_spread(root):
        raise AdapterError(
            "the model's weights lie in parts on several processes, which a second model cannot share; load the base "
            "again, or use dt.disabled(model)"
        )
    shared = {id(tensor): tensor for tensor in (*root.parameters(), *root.buffers())}
    base: nn.Module = copy.deepcopy(root, shared)
    for holder in holders(base):
        unhold(base, holder)
    keep_frozen(base)
    return base.eval()


@contextlib.contextmanager
def frozen_scales(model: nn.Module) -> Iterator[None]:
    """Compute every ``g = m / n`` once and reuse it within this context, whatever the mode.

    For inference with torch.compile or under FSDP, where doratune does not reuse scales by itself. Changes made to the
    adapter meanwhile do not reach g.
    """
    layers = [layer for layer in adapted_layers(model).values() if layer.active and layer.active in layer.magnitude]
    before = [layer.cache.frozen for layer in layers]
    try:
        with torch.no_grad():
            for layer in layers:
                assert layer.active is not None
                layer.cache.freeze(layer.row_scale(layer.active))
        yield
    finally:
        for layer, frozen in zip(layers, before, strict=True):
            if layer.cache.frozen is not None:  # else another adapter was switched to, whose g it is not
                layer.cache.freeze(frozen)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by name."""
    return {name: p for name, p in unwrap(model).named_parameters() if p.requires_grad}


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    magnitude_lr: float | None = None,
    weight_decay: float = 0.0,
    magnitude_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimiser.

    Magnitudes may have a learning rate of their own, and are not decayed unless asked: decay would pull them to 0,
    not to where they started. Biases are not decayed either.

    Raises:
        AdapterError: if no parameter of the model is to be trained.
    """
    trained = trainable_parameters(model)
    if not trained:
        raise AdapterError(
            "no parameter of the model is to be trained: attach an adapter, choose the active one with set_adapter, or "
            "load it with trainable=True (load_adapter freezes it otherwise)"
        )
    magnitudes = {id(p) for layer in adapted_layers(model).values() for p in layer.magnitude.values()}
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "biases": [], "magnitudes": []}
    for name, parameter in trained.items():
        is_bias = ".adapter_bias." in name or name.endswith("bias")
        key = "magnitudes" if id(parameter) in magnitudes else "biases" if is_bias else "weights"
        groups[key].append(parameter)
    options = {
        "weights": {"lr": lr, "weight_decay": weight_decay},
        "biases": {"lr": lr, "weight_decay": 0.0},
        "magnitudes": {"lr": lr if magnitude_lr is None else magnitude_lr, "weight_decay": magnitude_weight_decay},
    }
    return [{"name": key, "params": params, **options[key]} for key, params in groups.items() if params]
