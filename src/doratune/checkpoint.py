"""Adapters to and from disk, in PEFT's format.

A folder with ``adapter_config.json`` and ``adapter_model.safetensors``; keys ``base_model.model.<path>.<part>``. What
is written here, PEFT reads as the same function, and the other way round.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from doratune.config import AdapterConfig, matches, without_vain_options
from doratune.contents import BIAS, PREFIX, Contents, read_contents
from doratune.distributed import is_spread, processes, writes
from doratune.errors import AdapterError
from doratune.files import CONFIG, WEIGHTS, read_config, read_weights, write_adapter
from doratune.hub import adapter_folder
from doratune.layers import AdaptedLayer, SavedModule
from doratune.layers.sharded import assign, whole
from doratune.layers.weights import is_transformers_conv1d
from doratune.model import active_adapter, adapter_names, attach, delete_adapter, set_adapter
from doratune.own_options import metadata_of
from doratune.peft_config import from_peft, to_peft
from doratune.peft_experts import expert_counts, taken_for_experts, to_parameters
from doratune.targets import as_targets, layers_of, plain_modules, saved_modules, unwrap
from doratune.zero_rows import parts_for_file, recognise_plain_rows

log = logging.getLogger("doratune")

LISTED = 10
"""Problems of a file that are shown: one wrong base makes one of every tensor."""


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], name: str = "default") -> None:
    """Write one adapter to a folder, in PEFT's format, whole or not at all.

    An adapter on layers that PEFT cannot express (grouped convolutions, projections of ``nn.MultiheadAttention``) is
    written with the ``peft_type`` DORATUNE: doratune reads it back, PEFT refuses it, and a warning says why.

    Where parameters lie in parts on several processes (FSDP2, tensor parallelism) every process has to call it; the
    first one writes. Elsewhere whoever calls it writes.

    Raises:
        AdapterError: if there is no such adapter, a value is not finite, PEFT's options cannot name its modules, or
            the folder cannot be written.
    """
    root = unwrap(model)
    layers = layers_to_save(root, name)
    tensors = tensors_to_save(root, name)
    if not writes(root):
        return
    config = next(iter(layers.values())).adapters[name].config
    saved = [path for path in saved_modules(root) if matches(path, config.modules_to_save)]
    transposed = any(is_transformers_conv1d(layer.base_layer) for layer in layers.values())
    reasons = inexpressible(root, name)
    for reason, path in reasons.items():
        log.warning("%s is written for doratune only. %s: %s", folder, path, reason)
    options = to_peft(root, config, layers, saved, transposed, own_type=bool(reasons))
    if not reasons:
        tensors = to_parameters(tensors, expert_counts(plain_modules(root), layers))
    magnitude_only = (path for path, layer in layers.items() if layer.adapters[name].rank == 0)
    write_adapter(Path(folder), tensors, options, metadata_of(config, magnitude_only))


def layers_to_save(root: nn.Module, name: str) -> dict[str, AdaptedLayer]:
    """The layers of one adapter by path.

    Raises:
        AdapterError: if there is no such adapter.
    """
    layers = layers_of(root, name)
    if not layers:
        others = ", ".join(adapter_names(root))
        raise AdapterError(f"the model has no adapter {name!r} to save" + (f"; it has {others}" if others else ""))
    return layers


def tensors_to_save(root: nn.Module, name: str) -> dict[str, Tensor]:
    """One adapter's tensors as PEFT's files hold them; its layers' norms are decided anew, as reading it will.

    Raises:
        AdapterError: if the adapter has no data yet, or values that are not finite.
    """
    layers = layers_to_save(root, name)
    problems = [f"{path}: holds no data yet (meta device)" for path, layer in layers.items() if name in layer.waiting]
    tensors = {} if problems else adapter_tensors(root, name)
    problems += [f"{key}: not finite" for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if problems:
        raise AdapterError.of(f"adapter {name!r} cannot be saved", problems)
    if is_spread(root) or processes() == 1:  # alone, or all at once: what is decided has to be the same everywhere
        decide(root, name)
    return tensors


def inexpressible(root: nn.Module, name: str) -> dict[str, str]:
    """Why PEFT and all that read its format cannot have an adapter, each reason with a layer that it holds for."""
    layers = layers_of(root, name)
    refused = {
        path: layer.kind.file_refusal(layer.base_layer, layer.adapters[name].config) for path, layer in layers.items()
    }
    found = {reason: path for path, reason in refused.items() if reason is not None}
    redirected = taken_for_experts(root, [path for path, layer in layers.items() if layer.kind.name != "experts"])
    if redirected:
        names = ", ".join(sorted({path.rpartition(".")[2] for path in redirected}))
        found[f"PEFT takes {names} of a {root.config.model_type} for its experts'"] = redirected[0]  # type: ignore[union-attr]
    return found


def adapter_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """One adapter as it stands in a file: PEFT's keys, contiguous, on the CPU; its own parameters in float32."""
    tensors: dict[str, Tensor] = {}
    layers = layers_of(model, name)
    for path, layer in layers.items():
        for part, tensor in zip(layer.kind.file_names, parts_for_file(layer, name), strict=True):
            if tensor is not None:
                tensors[f"{PREFIX}{path}.{part}"] = layer.kind.to_file(layer.base_layer, part, tensor)
        if name in layer.adapter_bias:
            tensors[f"{PREFIX}{path}.{BIAS}"] = whole(layer.adapter_bias[name])
    modules = plain_modules(model)
    for path, saved in saved_modules(model).items():
        if name in saved.copies and path in modules:
            own = _saved_state(path, saved, name, layers)
            tensors.update({f"{PREFIX}{path}.{k}": v for k, v in own.items()})
    return {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}


def _saved_state(path: str, saved: SavedModule, name: str, layers: dict[str, AdaptedLayer]) -> dict[str, Tensor]:
    """What an adapter's copy of a module adds to the base: everything, or the biases that it trains."""
    state = {k: whole(v) for k, v in saved.copies[name].state_dict().items() if isinstance(v, Tensor)}
    config = next(iter(layers.values())).adapters[name].config
    if matches(path, config.modules_to_save):
        return state
    return {k: v for k, v in state.items() if k in saved.trained[name]}


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    *,
    trainable: bool = False,
    as_dora: bool = False,
) -> nn.Module:
    """Attach the adapter of a folder, written here or by PEFT, and make it the active one.

    Args:
        model: the model the adapter was made for.
        folder: where its two files are, or a name on the model hub, such as "user/adapter".
        name: what to call it here.
        trainable: True to go on training it.
        as_dora: read a plain LoRA file as the start of a DoRA adapter, ``m = |W + s B A|``: the same function.

    Returns:
        The same model.

    Raises:
        AdapterError: listing the problems by file, key and field, the first ten of many; the model is then unchanged.
    """
    root = unwrap(model)
    contents = read_adapter(root, adapter_folder(folder))
    config = config_of(root, contents)
    attach_filled(root, contents, replace(config, method="dora") if as_dora else config, name, trainable=trainable)
    return model


def config_of(root: nn.Module, contents: Contents) -> AdapterConfig:
    """Options that attach to this model what a file holds."""
    modules = plain_modules(root)
    # PEFT lists heads that some other model might have.
    names = [name for name in contents.config.modules_to_save if any(matches(path, [name]) for path in modules)]
    if {path for path in modules if matches(path, names)} != contents.whole:
        names = sorted(contents.whole)
    return replace(
        without_vain_options(contents.config, contents.layers),  # PEFT passes over patterns that fit nothing
        targets=as_targets(list(contents.layers), modules),
        exclude=(),
        modules_to_save=names,
    )


def attach_filled(root: nn.Module, contents: Contents, config: AdapterConfig, name: str, *, trainable: bool) -> None:
    """Attach an adapter on the layers of a file, with the file's values; if that fails, the model is unchanged."""
    before = active_adapter(root)
    attach(root, config, name, trainable=trainable)
    try:
        fill(root, contents, name)
    except BaseException:
        take_back(root, name, before)
        raise


def take_back(root: nn.Module, name: str, before: str | None) -> None:
    """Remove an adapter that was just attached and make the one active that was so before."""
    delete_adapter(root, name)
    if before is not None:
        set_adapter(root, before)


def read_adapter(root: nn.Module, folder: Path) -> Contents:
    """Read the adapter of a folder and compare it with the model.

    Raises:
        AdapterError: listing the problems, the first ten of many.
    """
    options = from_peft(read_config(folder), str(folder / CONFIG))
    tensors, metadata = read_weights(folder)
    contents = read_contents(root, options, tensors, metadata)
    if contents.problems:
        raise AdapterError.of(f"{folder / WEIGHTS} does not fit", contents.problems, at_most=LISTED)
    return contents


def fill(root: nn.Module, contents: Contents, name: str) -> None:
    """Copy a file's tensors, already checked, into an adapter of the same kind, in place."""
    for path, layer in layers_of(root, name).items():
        _fill_layer(path, layer, name, contents.layers[path])
    without_place = dict(contents.saved)
    for path, saved in saved_modules(root).items():
        if name in saved.copies:
            saved.initialise()
            own = saved.copies[name].state_dict()
            for key, tensor in without_place.pop(path, {}).items():
                assign(own[key], tensor)
    if without_place:
        reason = "its parameters cannot be an adapter's here"
        raise AdapterError.of(f"{WEIGHTS} does not fit", [f"{path}: {reason}" for path in without_place])


@torch.no_grad()
def _fill_layer(path: str, layer: AdaptedLayer, name: str, parts: dict[str, Tensor]) -> None:
    base, kind = layer.base_layer, layer.kind
    a, b, m = kind.file_names
    if name in layer.lora_A:
        assign(layer.lora_A[name], kind.from_file(base, a, parts[a]))
        assign(layer.lora_B[name], kind.from_file(base, b, parts[b]))
    if name in layer.adapter_bias:
        assign(layer.adapter_bias[name], parts[BIAS])
    if name in layer.magnitude:
        if m in parts:
            assign(layer.magnitude[name], kind.from_file(base, m, parts[m]))
            recognise_plain_rows(layer, name)
        else:
            layer.reset_magnitude(name)
    _decide_layer(path, layer, name)


def decide(root: nn.Module, name: str) -> None:
    """Choose each layer's norm and what it keeps for the backward pass from the adapter's values.

    With parts on several processes all have to call it.
    """
    for path, layer in layers_of(root, name).items():
        _decide_layer(path, layer, name)


def _decide_layer(path: str, layer: AdaptedLayer, name: str) -> None:
    layer.decide(name)
    if layer.adapters[name].dense_norm:
        log.warning("%s: W + s B A nearly cancels in some rows; this layer computes its norm densely", path)
