"""Adapters to and from disk, in PEFT's format.

A folder with ``adapter_config.json`` and ``adapter_model.safetensors``; keys ``base_model.model.<path>.<part>``. What is
written here, PEFT reads as the same function, and the other way round.
"""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from doratune.config import AdapterConfig
from doratune.errors import AdapterError
from doratune.files import WEIGHTS, read_config, read_weights, write_adapter
from doratune.layers import AdaptedLayer, Kind, SavedModule, kind_of
from doratune.layers.weights import is_transformers_conv1d
from doratune.model import attach
from doratune.peft_config import from_peft, to_peft, with_own_options
from doratune.targets import adapted_layers, as_targets, plain_modules, refusal, saved_modules, unwrap

log = logging.getLogger("doratune")

PREFIX = "base_model.model."
METADATA = "doratune"
"""Key in the weights' metadata for what PEFT's options cannot say."""
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SAME_NORM = 1e-4
"""A zero row of W whose stored m is its norm, up to this relative difference, is trained as plain LoRA."""


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], name: str = "default") -> None:
    """Write one adapter to a folder, in PEFT's format, whole or not at all.

    Raises:
        AdapterError: if there is no such adapter, a value is not finite, the format cannot express the adapter, or the
            folder cannot be written.
    """
    root = unwrap(model)
    layers = {path: layer for path, layer in adapted_layers(root).items() if name in layer.adapters}
    if not layers:
        raise AdapterError(f"the model has no adapter {name!r} to save")
    tensors = adapter_tensors(root, name)
    problems = [f"{key}: not finite" for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    problems += [
        f"{path}: {reason}"
        for path, layer in layers.items()
        if (reason := layer.kind.file_refusal(layer.base_layer)) is not None
    ]
    if problems:
        raise AdapterError.of(f"adapter {name!r} cannot be saved", problems)
    for path, layer in layers.items():
        _look_for_cancellation(path, layer, name)
    config = next(iter(layers.values())).adapters[name].config
    transposed = all(is_transformers_conv1d(layer.base_layer) for layer in layers.values())
    own = {
        "magnitude_only": sorted(path for path, layer in layers.items() if layer.adapters[name].rank == 0),
        "norm_gradient": config.norm_gradient,
        "init": config.init,
    }
    write_adapter(Path(folder), tensors, to_peft(root, config, layers, transposed), {METADATA: json.dumps(own)})


def adapter_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """One adapter as it stands in a file: PEFT's keys, float32, contiguous, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for path, layer in adapted_layers(model).items():
        if name not in layer.adapters:
            continue
        for part, tensor in zip(layer.kind.file_names, _parts(layer, name), strict=True):
            if tensor is not None:
                tensors[f"{PREFIX}{path}.{part}"] = layer.kind.to_file(layer.base_layer, part, tensor)
        if name in layer.adapter_bias:
            tensors[f"{PREFIX}{path}.base_layer.bias"] = layer.adapter_bias[name]
    for path, saved in saved_modules(model).items():
        if name in saved.copies:
            tensors.update({f"{PREFIX}{path}.{k}": v for k, v in _saved_state(saved, name).items()})
    return {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}


def _saved_state(saved: SavedModule, name: str) -> dict[str, Tensor]:
    """What an adapter's copy of a module adds to the base: its own parameters and, for whole modules, buffers."""
    state = saved.copies[name].state_dict()
    shared = {n for n, _ in saved.base_layer.named_parameters()} - set(saved.trained[name])
    buffers = {n for n, _ in saved.base_layer.named_buffers()} if not shared else set()
    return {k: v for k, v in state.items() if k in saved.trained[name] or k in buffers}


@torch.no_grad()
def _parts(layer: AdaptedLayer, name: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """A, B and m for a file. Rows of W that are zero get an m, or a row of B, that others can divide by."""
    rows = layer.kind.rows(layer.base_layer)
    if name in layer.lora_A:
        A, B = layer.lora_A[name].detach(), layer.lora_B[name].detach()
    else:
        A = torch.full((1, rows.shape[1]), rows.shape[1] ** -0.5, device=rows.device)
        B = torch.zeros(rows.shape[0], 1, device=rows.device)
    if name not in layer.magnitude:
        return A, B, None
    m = layer.magnitude[name].detach()
    plain = (layer.cache.base_squared(rows) == 0) & (m == 0)
    if plain.any():
        n = layer.squared_norm(name).sqrt()
        m = torch.where(plain, n, m)
        # m = 0 makes the row 0 whatever B is; a row of B that is not 0 keeps others from dividing 0 by 0.
        B = B.clone()
        B[plain & (n == 0), int(A.square().sum(1).argmax())] = 1e-3
    return A, B, m


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
        trainable: True to go on training it.
        as_dora: read a plain LoRA file as the start of a DoRA adapter, ``m = |W + s B A|``: the same function.

    Returns:
        The same model.

    Raises:
        AdapterError: listing every problem by file, key and field; the model is then unchanged.
    """
    root, folder = unwrap(model), Path(folder)
    options = from_peft(read_config(folder), str(folder / "adapter_config.json"))
    tensors, metadata = read_weights(folder)
    contents = _sort(root, options.config, tensors, metadata)
    contents.check(root, options.targeted(root))
    if contents.problems:
        raise AdapterError.of(f"{folder / WEIGHTS} does not fit", contents.problems)
    config = replace(
        contents.config,
        targets=as_targets(list(contents.layers), plain_modules(root)),
        exclude=(),
        method="dora" if as_dora else options.config.method,
    )
    attach(root, config, name, trainable=trainable)
    for path, layer in adapted_layers(root).items():
        if path in contents.layers:
            _fill(path, layer, name, contents.layers[path])
    for path, saved in saved_modules(root).items():
        if name in saved.copies:
            saved.copies[name].load_state_dict(contents.saved.get(path, {}), strict=False)
    return model


@dataclass
class _Contents:
    """A file's tensors, sorted by the module they belong to."""

    config: AdapterConfig
    layers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def check(self, root: nn.Module, targeted: set[str]) -> None:
        """Compare with the model and the options: every tensor expected is there, and none other."""
        modules = plain_modules(root)
        for path in sorted(targeted | set(self.layers)):
            module = modules.get(path)
            kind = None if module is None else kind_of(module)
            if module is None:
                self.problems.append(f"{path}: the model has no such module; is the file of another model?")
            elif path not in self.layers:
                self.problems.append(f"{path}: the options target it, but the file has no tensors for it")
            elif path not in targeted:
                self.problems.append(f"{path}: the file has tensors for it, but the options do not target it")
            elif kind is None or (reason := refusal(root, modules, path) or kind.file_refusal(module)):
                self.problems.append(
                    f"{path}: {reason if kind else f'no kind of layer serves {type(module).__name__}'}"
                )
            else:
                self._check_layer(path, module, kind)
        self._check_saved(modules)

    def _check_layer(self, path: str, base: nn.Module, kind: Kind) -> None:
        parts = self.layers[path]
        rows = kind.rows(base)
        if rows.stored.is_meta:
            self.problems.append(f"{path}: the model holds no data yet (meta device); load the base model first")
            return
        out, columns = rows.shape
        rank = max(1, self.config.rank_of(path))
        a, b, m = kind.file_names
        like = {a: (rank, columns), b: (out, rank)}
        if self.config.method == "dora":
            like[m] = (out,)
        if "base_layer.bias" in parts and self.config.bias != "none" and getattr(base, "bias", None) is not None:
            like["base_layer.bias"] = (out,)
        for part, shape in like.items():
            if part not in parts:
                self.problems.append(f"{PREFIX}{path}.{part}: missing")
                continue
            expected = tuple(kind.to_file(base, part, torch.empty(shape, device="meta")).shape)
            found = tuple(parts[part].shape)
            if found != expected:
                self.problems.append(f"{PREFIX}{path}.{part}: expected shape {expected}, found {found}")
        for part in parts.keys() - like.keys():
            if part == "base_layer.weight" and _same(parts[part], getattr(base, "weight", None)):
                continue  # PEFT adds the table of an adapted embedding; the model's own is the same
            self.problems.append(f"{PREFIX}{path}.{part}: {_why_unexpected(part, self.config)}")

    def _check_saved(self, modules: dict[str, nn.Module]) -> None:
        for path, state in self.saved.items():
            own = modules[path].state_dict()
            for key, tensor in state.items():
                if tensor.shape != own[key].shape:
                    expected, found = tuple(own[key].shape), tuple(tensor.shape)
                    self.problems.append(f"{PREFIX}{path}.{key}: expected shape {expected}, found {found}")
            if self.config.bias != "all":
                self.problems.extend(f"{PREFIX}{path}.{key}: missing" for key in own.keys() - state.keys())
        for name in self.config.modules_to_save:
            if not any(path == name or path.endswith("." + name) for path in self.saved):
                self.problems.append(f"modules_to_save {name!r}: the file has no tensors for it")


PARTS = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "base_layer.bias",
    "base_layer.weight",
)
KEY = re.compile(rf"(?P<path>.+)\.(?P<part>{'|'.join(re.escape(p) for p in PARTS)})(?:(?<=vector)\.weight)?")


def _sort(root: nn.Module, config: AdapterConfig, tensors: dict[str, Tensor], metadata: dict[str, str]) -> _Contents:
    contents = _Contents(config)
    try:
        contents.config = with_own_options(config, json.loads(metadata.get(METADATA, "{}")))
    except (ValueError, TypeError, AttributeError) as error:
        contents.problems.append(f"metadata {METADATA!r}: {error}")
    modules = plain_modules(root)
    saved = [p for p in modules if p and any(p == n or p.endswith("." + n) for n in config.modules_to_save)]
    for key, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            names = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
            contents.problems.append(
                f"{key}: expected one of {names}, found {str(tensor.dtype).removeprefix('torch.')}"
            )
            continue
        if not torch.isfinite(tensor).all():
            contents.problems.append(f"{key}: holds NaN or infinite values")
            continue
        if not key.startswith(PREFIX):
            contents.problems.append(f"{key}: unknown key; expected it to start with {PREFIX!r}")
            continue
        inner = key.removeprefix(PREFIX)
        match = KEY.fullmatch(inner)
        owner = next((p for p in saved if inner.startswith(p + ".")), None)
        module, _, parameter = inner.rpartition(".")
        if match:
            contents.layers.setdefault(match["path"], {})[match["part"]] = tensor
        elif owner is not None and inner.removeprefix(owner + ".") in modules[owner].state_dict():
            contents.saved.setdefault(owner, {})[inner.removeprefix(owner + ".")] = tensor
        elif (
            config.bias == "all"
            and "bias" in parameter
            and parameter in getattr(modules.get(module), "_parameters", {})
        ):
            contents.saved.setdefault(module, {})[parameter] = tensor
        else:
            contents.problems.append(f"{key}: unknown key; nothing in the model or the options corresponds to it")
    return contents


def _why_unexpected(part: str, config: AdapterConfig) -> str:
    if part == "base_layer.weight":
        return "a weight of the base model that differs from the model's own; an adapter's file may not replace it"
    if part == "lora_magnitude_vector":
        return "a magnitude, but use_dora is not set"
    if part == "base_layer.bias":
        return f"a bias, but bias is {config.bias!r} or the layer has none"
    return "does not belong to a layer of this kind"


def _same(stored: Tensor, own: Tensor | None) -> bool:
    return own is not None and stored.shape == own.shape and torch.equal(stored.to(own.dtype), own.detach().cpu())


@torch.no_grad()
def _fill(path: str, layer: AdaptedLayer, name: str, parts: dict[str, Tensor]) -> None:
    """Copy a file's tensors, already checked, into a fresh adapter."""
    base, kind = layer.base_layer, layer.kind
    a, b, m = kind.file_names
    if name in layer.lora_A:
        layer.lora_A[name].copy_(kind.from_file(base, a, parts[a]))
        layer.lora_B[name].copy_(kind.from_file(base, b, parts[b]))
    if name in layer.adapter_bias and "base_layer.bias" in parts:
        layer.adapter_bias[name].copy_(parts["base_layer.bias"])
    if name in layer.magnitude:
        if m in parts:
            layer.magnitude[name].copy_(kind.from_file(base, m, parts[m]))
            _recognise_plain_rows(layer, name)
        else:
            layer.reset_magnitude(name)
    layer.decide(name)
    _look_for_cancellation(path, layer, name)


def _recognise_plain_rows(layer: AdaptedLayer, name: str) -> None:
    """Zero rows of W whose m is their norm train as plain LoRA rows again; any other m is honoured."""
    zero = layer.cache.base_squared(layer.kind.rows(layer.base_layer)) == 0
    if not zero.any():
        return
    m = layer.magnitude[name]
    if name in layer.lora_B:
        layer.lora_B[name][zero & (m == 0)] = 0  # the row is 0 either way
    n = layer.squared_norm(name).sqrt()
    m[zero & ((m - n).abs() <= SAME_NORM * n)] = 0


def _look_for_cancellation(path: str, layer: AdaptedLayer, name: str) -> None:
    layer.decide(name)
    if layer.adapters[name].dense_norm:
        log.warning("%s: W + s B A nearly cancels in some rows; this layer computes its norm densely", path)


__all__ = ["adapter_tensors", "load_adapter", "save_adapter"]
