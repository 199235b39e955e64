"""Adapters in the files of kohya's sd-scripts and LyCORIS, which ComfyUI and others read.

    import doratune as dt

    dt.kohya.load_adapter({"lora_unet": pipe.unet, "lora_te": pipe.text_encoder}, "style.safetensors")
    dt.kohya.save_adapter({"lora_unet": pipe.unet}, "style.safetensors")

A layer's keys are its path with underscores for dots, after a prefix for its model. ``lora_down`` is A, ``lora_up`` B,
``alpha / rank`` s, and ``dora_scale`` m. The function is that of LyCORIS with ``dora_wd=True, wd_on_output=True``.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from doratune.contents import PREFIX
from doratune.distributed import writes
from doratune.errors import AdapterError
from doratune.files import write_weights
from doratune.interop.several import (
    Adapter,
    Models,
    Part,
    adapters,
    attach_parts,
    checked,
    grouped,
    options_for,
    rank_by_shape,
    read_one_file,
)
from doratune.interop.unet_names import original_names
from doratune.layers import Kind, kind_of
from doratune.renamed import todays_names
from doratune.targets import plain_modules

__all__ = ["load_adapter", "save_adapter"]

UNET, LYCORIS = "lora_unet", "lycoris"
EXAMPLE = '{"lora_unet": pipe.unet, "lora_te": pipe.text_encoder}'
DOWN, UP, ALPHA, SCALE = "lora_down.weight", "lora_up.weight", "alpha", "dora_scale"
FOREIGN = {
    r"hada_": "LoHa",
    r"lokr_": "LoKr",
    r"oft_": "OFT",
    r"[ab][12]\.|bm\.": "GLoRA",
    r"on_input|weight$": "(IA)^3",
    r"lora_mid": "Tucker decomposition of a convolution (use_tucker)",
    r"diff": "a whole change of a weight or bias",
    r"[wb]_norm": "a trained norm layer (train_norm)",
}
"""Beginnings of what other methods store for a layer."""
INPUT_AXIS = (
    "its dora_scale lies along the input axis (LyCORIS with wd_on_output=False): it scales columns of the weight, "
    "and the magnitudes of doratune and PEFT scale rows; train with wd_on_output=True"
)
WITHOUT_PLACE = {
    "embedding": "an embedding",
    "attention": "a projection packed into nn.MultiheadAttention's weight",
    "experts": "a weight of fused experts",
}
Given = TypeVar("Given", bound=nn.Module | Models)


def load_adapter(
    models: Given, file: str | os.PathLike[str], name: str = "default", *, trainable: bool = False
) -> Given:
    """Attach the adapters of a file to their models, all or none, and make them the active ones.

    Args:
        models: the file's prefixes, each with the model that it stands for (``lora_unet``, ``lora_te``; of SDXL
            ``lora_te1`` and ``lora_te2``), or None to leave a part of the file out; one model stands for ``lora_unet``.
        file: a safetensors file.
        name: what to call the adapters here.
        trainable: True to go on training them.

    Returns:
        The same models.

    Raises:
        AdapterError: listing the problems by key, the first ten of many; the models are then unchanged.
    """
    file = Path(file).expanduser()
    tensors, _ = read_one_file(file)
    if isinstance(models, nn.Module):
        own = bool(tensors) and all(key.startswith(f"{LYCORIS}_") for key in tensors)
        given = checked({LYCORIS if own else UNET: models}, EXAMPLE)
    else:
        given = checked(models, EXAMPLE)
    problems: list[str] = []
    layers = _sorted(given, tensors, problems)
    parts = [
        part
        for prefix, model in given.items()
        if model is not None and (part := _part(prefix, model, layers[prefix], problems))
    ]
    attach_parts(file, parts, problems, name, trainable=trainable)
    return models


def _sorted(models: Models, tensors: dict[str, Tensor], problems: list[str]) -> dict[str, dict[str, dict[str, Tensor]]]:
    """The file's tensors by prefix, layer's name (with its prefix) and part; what has no place goes to ``problems``."""
    layers: dict[str, dict[str, dict[str, Tensor]]] = {prefix: {} for prefix in models}
    findings: list[tuple[str, str]] = []
    foreign: set[str] = set()
    for key, tensor in tensors.items():
        layer, _, part = key.partition(".")
        prefix = next((p for p in sorted(models, key=len, reverse=True) if layer.startswith(f"{p}_")), None)
        if prefix is None:
            findings.append((key, _why_no_model(key, models)))
        elif models[prefix] is None:
            continue
        elif part in (DOWN, UP, ALPHA, SCALE):
            layers[prefix].setdefault(layer, {})[part] = tensor
        else:
            method = next((method for start, method in FOREIGN.items() if re.match(start, part)), None)
            unknown = f"unknown; expected {DOWN}, {UP}, {ALPHA} or {SCALE}"
            findings.append((key, f"{method} is not supported; LoRA and DoRA are" if method else unknown))
            foreign.add(layer)
    problems += grouped(findings)
    for prefix, found in layers.items():
        if models[prefix] is not None and not any(key.startswith(f"{prefix}_") for key in tensors):
            problems.append(f"{prefix}: the file holds nothing for it; leave it out of models")
        for layer in foreign & found.keys():
            del found[layer]
    return layers


def _why_no_model(key: str, models: Models) -> str:
    if re.search(r"\.lora_[AB]\.|lora_magnitude_vector", key):
        return "PEFT's names; use dt.load_adapter for PEFT's folders and dt.diffusers.load_adapter for diffusers' files"
    known = re.match(r"(lora_[a-z]+\d?|lycoris)_", key)
    if known is None:
        return f"begins with none of {', '.join(models)}"
    return f"models has no {known[1]!r}; add it with its model, or with None to leave this part of the file out"


def _part(prefix: str, model: nn.Module, layers: dict[str, dict[str, Tensor]], problems: list[str]) -> Part | None:
    """What the file holds for one model in PEFT's terms; what cannot be put so goes to ``problems``."""
    modules, paths = plain_modules(model), _paths(model)
    dora = any(SCALE in parts for parts in layers.values())
    scales: dict[str, tuple[int, float]] = {}
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    findings: list[tuple[str, str]] = []
    for layer, parts in layers.items():
        found = paths.get(layer.removeprefix(f"{prefix}_"), [])
        reason = None
        if not found:
            reason = "the model has no such layer; is the file of another model?"
        elif len(found) > 1:
            reason = f"its name fits several layers: {', '.join(found)}"
        elif found[0] in names:
            reason = f"the file holds this layer twice, as {names[found[0]]}, too"
        elif dora and SCALE not in parts:
            reason = "has no dora_scale, which other layers have; an adapter is DoRA in all its layers or in none"
        reason = reason or _unreadable(modules[found[0]], parts)
        if reason is not None:
            findings.append((layer, reason))
            continue
        path = found[0]
        names[path] = layer
        rank = rank_by_shape(parts.get(DOWN), parts.get(UP))
        scales[path] = rank, float(parts.get(ALPHA, rank))  # without an alpha s is 1
        for key, (part, tensor) in _in_peft(modules[path], parts).items():
            names[f"{PREFIX}{path}.{part}"] = f"{layer}.{key}"
            if tensor is not None:
                tensors[f"{PREFIX}{path}.{part}"] = tensor
    problems += grouped(findings)
    return Part(model, options_for(model, scales, dora), tensors, names) if scales else None


def _unreadable(base: nn.Module, parts: dict[str, Tensor]) -> str | None:
    """What is wrong with a layer's alpha or dora_scale, or with the layer, that PEFT's format would not show."""
    alpha, magnitude, kind = parts.get(ALPHA), parts.get(SCALE), kind_of(base)
    if kind is not None and kind.name in WITHOUT_PLACE:
        return f"is {WITHOUT_PLACE[kind.name]}, for which this format has no place"
    if alpha is not None and (alpha.numel() != 1 or alpha.is_complex() or not 0 < float(alpha) < math.inf):
        return f"{ALPHA}: expected one finite number above 0, found {alpha.flatten()[:5].tolist()}"
    if magnitude is None or kind is None:
        return None
    out = kind.rows(base).shape[0]
    dimensions = _dimensions(kind, base)
    if magnitude.numel() == magnitude.shape[:1].numel() == out:
        return None
    if magnitude.ndim == dimensions and magnitude.shape[0] == 1 and magnitude.numel() == magnitude.shape[1]:
        return INPUT_AXIS
    expected = (out, *[1] * (dimensions - 1))
    return f"{SCALE}: expected shape {expected}, found {tuple(magnitude.shape)}"


def _in_peft(base: nn.Module, parts: dict[str, Tensor]) -> dict[str, tuple[str, Tensor | None]]:
    """For each of the file's names of A, B and m PEFT's name and the tensor as PEFT has it, None if it is not there."""
    kind = kind_of(base)
    names = (kind or Kind).file_names
    found = {key: (name, parts.get(key)) for key, name in zip((DOWN, UP, SCALE), names, strict=True)}
    for key, (name, tensor) in found.items():
        if kind is None or tensor is None:
            continue
        if key == SCALE:
            found[key] = name, kind.to_file(base, name, tensor.reshape(-1))
            continue
        # A linear layer's may be stored as that of a convolution with a kernel of 1, and the other way round.
        dimensions = _dimensions(kind, base)
        shape = (*tensor.shape[:dimensions], *[1] * (dimensions - tensor.ndim))
        if tensor.ndim >= 2 and tensor.shape[dimensions:].numel() == 1:
            found[key] = name, tensor.reshape(shape)
    return found


def _dimensions(kind: Kind, base: nn.Module) -> int:
    """Of A and B in a file: 2, or those of a convolution's weight."""
    columns = kind.rows(base).shape[1]
    return kind.to_file(base, kind.file_names[0], torch.empty(1, columns, device="meta")).ndim


def _former(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, str]:
    """The name that each module had in transformers 4, by today's: CLIP's text encoder lost its ``text_model``."""
    names = todays_names(model, [f"text_model.{path}" for path in modules if path], modules)
    return {today: former for former, today in names.items()}


def _paths(model: nn.Module) -> dict[str, list[str]]:
    """The layers that a file's name, less its prefix, may mean."""
    modules = plain_modules(model)
    paths: dict[str, list[str]] = {}
    layers = [path for path, m in modules.items() if path and (kind_of(m) or any(True for _ in m.parameters(False)))]
    for names in ({path: path for path in layers}, original_names(modules), _former(model, modules)):
        for path in layers:
            if path in names:
                paths.setdefault(names[path].replace(".", "_"), []).append(path)
    return paths


def save_adapter(models: nn.Module | Models, file: str | os.PathLike[str], name: str = "default") -> None:
    """Write the adapters of several models to one file, whole or not at all.

    A layer without a change of direction (rank 0) is written with rank 1 and zeros. What the format has no place for is
    refused: trained biases, modules trained whole, embeddings, the projections of ``nn.MultiheadAttention``.

    Args:
        models: as for ``load_adapter``; layers of a UNet get diffusers' names.
        file: its name ends in ``.safetensors``.
        name: of the adapters.

    Raises:
        AdapterError: listing what cannot be written, or if the file cannot be.
    """
    file = Path(file)
    if file.suffix != ".safetensors":
        raise AdapterError(f"{file}: expected a name that ends in .safetensors")
    given = checked({UNET: models} if isinstance(models, nn.Module) else models, EXAMPLE)
    problems: list[str] = []
    tensors: dict[str, Tensor] = {}
    found = adapters(given, name, problems)
    for prefix, adapter in found.items():
        tensors.update(_to_file(prefix, adapter, name, problems))
    if problems:
        raise AdapterError.of(f"adapter {name!r} cannot be saved to {file}", problems)
    if all(writes(adapter.model) for adapter in found.values()):
        write_weights(file, tensors, {})


def _to_file(prefix: str, adapter: Adapter, name: str, problems: list[str]) -> dict[str, Tensor]:
    """One model's tensors under the file's keys; what has no place goes to ``problems``."""
    tensors: dict[str, Tensor] = {}
    findings: list[tuple[str, str]] = []
    paths, former = _paths(adapter.model), _former(adapter.model, plain_modules(adapter.model))
    left = dict(adapter.tensors)
    for path, layer in adapter.layers.items():
        A, B, m = (left.pop(f"{PREFIX}{path}.{part}", None) for part in layer.kind.file_names)
        flat = former.get(path, path).replace(".", "_")
        if layer.kind.name in WITHOUT_PLACE:
            findings.append((path, f"is {WITHOUT_PLACE[layer.kind.name]}"))
        elif paths[flat] != [path]:
            others = ", ".join(other for other in paths[flat] if other != path)
            findings.append((path, f"its name there, {flat}, is that of {others}, too"))
        else:
            assert A is not None
            assert B is not None
            scale = layer.adapters[name].scale or 1.0  # 0 where the rank is 0, and B with it
            tensors[f"{prefix}_{flat}.{ALPHA}"] = torch.tensor(scale * A.shape[0])
            tensors[f"{prefix}_{flat}.{DOWN}"] = A
            tensors[f"{prefix}_{flat}.{UP}"] = B
            if m is not None:
                tensors[f"{prefix}_{flat}.{SCALE}"] = m.reshape(-1, *[1] * (A.ndim - 1))
    findings += ((key.removeprefix(PREFIX), "is a trained bias or of a module trained whole") for key in left)
    problems += [f"{prefix}: {problem}, for which this format has no place" for problem in grouped(findings)]
    return tensors
