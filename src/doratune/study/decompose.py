"""How far training moved each weight, split as DoRA splits it: magnitude and direction (paper section 3.2).

For a weight with rows ``w`` before and ``w'`` after::

    delta M = mean over rows of | |w'| - |w| |         delta D = mean over rows of (1 - cos(w', w))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from doratune.errors import AdapterError
from doratune.layers import AdaptedLayer, AdapterHolder, kind_of
from doratune.layers.weights import WeightRows
from doratune.targets import adapted_layers, plain_modules, saved_modules, unwrap

Source = nn.Module | Mapping[str, Tensor]

TILE = 1 << 17
"""Numbers that are looked at at a time."""


@dataclass(frozen=True)
class Decomposition:
    """How far one weight moved."""

    magnitude: float
    """delta M, in the weight's own units."""
    direction: float
    """delta D: 0 where no row turned, 1 at right angles, 2 for opposite rows."""
    relative_magnitude: float
    """delta M per mean row norm before."""
    rows: int


@dataclass(frozen=True)
class _Weight:
    """One weight, ``[out, in]``, read a few rows at a time in float64."""

    shape: tuple[int, int]
    rows: Callable[[slice], Tensor]


@torch.no_grad()
def decompose(before: Source, after: Source) -> dict[str, Decomposition]:
    """Magnitude and direction change of every weight that two models have in common.

    Args:
        before, after: models or state dicts. A model's active adapter counts as part of its weights, so
            ``decompose(base, adapted)`` needs no merging. Weights of linear layers, embeddings and convolutions of a
            model are taken as an adapter would see them; in a state dict every weight of two or more dimensions counts,
            and its first dimension is the rows.

    Returns:
        For each weight's path (without ".weight") how far it moved. Sums are float64, a few rows at a time.

    Raises:
        AdapterError: if the two have no weight in common, or listing those whose shapes differ.
    """
    old, new = _weights(before, "before"), _weights(after, "after")
    common = [path for path in old if path in new]
    if not common:
        raise AdapterError(
            f"decompose: the two have no weight in common; before has {_some(old)}, after has {_some(new)}"
        )
    problems = [
        f"{path}: before {old[path].shape}, after {new[path].shape}"
        for path in common
        if old[path].shape != new[path].shape
    ]
    if problems:
        raise AdapterError.of("decompose: shapes differ", problems)
    return {path: _moved(old[path], new[path]) for path in common}


@torch.no_grad()
def adapter_change(model: nn.Module) -> dict[str, Decomposition]:
    """How far the active adapter moves each layer that it adapts, from the base weight in the same model.

    Raises:
        AdapterError: if no adapter is active.
    """
    layers = {path: layer for path, layer in adapted_layers(model).items() if layer.active is not None}
    if not layers:
        raise AdapterError("adapter_change: no adapter is active on the model")
    return {
        path: _moved(_of_rows(layer.kind.rows(layer.base_layer)), _of_layer(layer)) for path, layer in layers.items()
    }


def _moved(old: _Weight, new: _Weight) -> Decomposition:
    magnitude = direction = norm = 0.0
    for rows in _few_rows(*old.shape):
        w, v = old.rows(rows), new.rows(rows)
        m, n = w.norm(dim=1), v.norm(dim=1)
        product = m * n
        # Of two rows that are both zero none has turned; a row that came from zero or went there points nowhere.
        cosine = torch.where(product > 0, (w * v).sum(1) / product.where(product > 0, 1.0), (m == n).to(m.dtype))
        magnitude += float((n - m).abs().sum())
        direction += float((1 - cosine.clamp(-1, 1)).sum())
        norm += float(m.sum())
    count = old.shape[0]
    return Decomposition(magnitude / count, direction / count, magnitude / norm if norm else 0.0, count)


def _few_rows(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows that stay in a core's cache through the dozen passes over them."""
    step = max(1, TILE // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _weights(source: Source, which: str) -> dict[str, _Weight]:
    if isinstance(source, nn.Module):
        return _of_model(source)
    if any(".base_layer." in key for key in source):
        raise AdapterError(f"decompose: {which} is the state dict of a model with adapters; give the model itself")
    return {
        key.removesuffix(".weight"): _of_matrix(tensor.detach().flatten(1))
        for key, tensor in source.items()
        if tensor.ndim > 1 and tensor.is_floating_point()
    }


def _of_matrix(matrix: Tensor) -> _Weight:
    return _Weight((matrix.shape[0], matrix.shape[1]), lambda rows: matrix[rows].double())


def _of_model(model: nn.Module) -> dict[str, _Weight]:
    root = unwrap(model)
    held: dict[str, AdapterHolder] = {**adapted_layers(root), **saved_modules(root)}
    found: dict[str, _Weight] = {}
    for path, module in plain_modules(root).items():
        holder = _holder(held, path)
        if isinstance(holder, AdaptedLayer):
            found[path] = _of_layer(holder)
        elif (kind := kind_of(module)) is not None:
            found[path] = _of_rows(kind.rows(_chosen(holder, path, module)))
    return found


def _holder(held: Mapping[str, AdapterHolder], path: str) -> AdapterHolder | None:
    """What holds the module at a path, or a module around it."""
    parts = path.split(".")
    return next((h for n in range(len(parts), 0, -1) if (h := held.get(".".join(parts[:n]))) is not None), None)


def _chosen(holder: AdapterHolder | None, path: str, module: nn.Module) -> nn.Module:
    """The active adapter's copy of a module that is trained whole."""
    if holder is None or not hasattr(holder, "chosen"):
        return module
    inner = path.removeprefix(holder.path).lstrip(".")
    chosen: nn.Module = holder.chosen()
    return chosen.get_submodule(inner)


def _of_rows(weight: WeightRows) -> _Weight:
    def read(rows: slice) -> Tensor:
        parts = []
        for outer, tile in weight.tiles():
            start, stop = max(rows.start, outer.start), min(rows.stop, outer.stop)
            if start < stop:
                parts.append(tile[start - outer.start : stop - outer.start].double())
        return torch.cat(parts)

    return _Weight(weight.shape, read)


def _of_layer(layer: AdaptedLayer) -> _Weight:
    """``W' = m (W + s B A) / n`` of the active adapter, in float64 rather than as merging would round it."""
    weight = _of_rows(layer.kind.rows(layer.base_layer))
    name = layer.active
    if name is None or not layer.enabled:
        return weight
    adapter = layer.adapters[name]

    def read(rows: slice) -> Tensor:
        base = weight.rows(rows)
        moved = base
        if name in layer.lora_A:
            moved = base + adapter.scale * (layer.lora_B[name][rows].double() @ layer.lora_A[name].double())
        if name not in layer.magnitude:
            return moved
        m, n = layer.magnitude[name][rows].double(), moved.norm(dim=1)
        plain = (m == 0) & (base.norm(dim=1) == 0)
        g = torch.where(plain, 1.0, m / n.where(n > 0, 1.0))
        return g[:, None] * moved

    return _Weight(weight.shape, read)


def _some(weights: Mapping[str, _Weight]) -> str:
    names = list(weights)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"
