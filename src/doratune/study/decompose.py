"""How far training moved each weight, split as DoRA splits it: magnitude and direction (paper section 3.2).

For a weight with rows ``w`` before and ``w'`` after::

    delta M = mean over rows of | |w'| - |w| |         delta D = mean over rows of (1 - cos(w', w))

and the change itself splits without remainder::

    |w' - w|^2 = (|w'| - |w|)^2 + 2 |w'| |w| (1 - cos(w', w))
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from doratune.errors import AdapterError
from doratune.layers import AdaptedLayer, AdapterHolder, SavedModule, kind_of
from doratune.layers.weights import WeightRows
from doratune.study.matrix import Matrix, adapted
from doratune.study.names import some
from doratune.study.spectrum import LARGEST, BaseSpectrum, Spectrum
from doratune.targets import adapted_layers, plain_modules, saved_modules, unwrap

Source = nn.Module | Mapping[str, Tensor]


@dataclass(frozen=True)
class Decomposition:
    """How far one weight moved; all NaN where it holds NaN or infinity, before or after."""

    magnitude: float
    """delta M, in the weight's own units."""
    direction: float
    """delta D: 0 where no row turned, 1 at right angles, 2 for opposite rows."""
    relative_magnitude: float
    """delta M per mean row norm before."""
    rows: int
    size: float
    """Size of the change, in the Frobenius norm."""
    relative_size: float
    """Size of the change per size of the weight before."""
    magnitude_share: float
    """Share of the squared size that is due to the rows' lengths; the rest is due to their directions."""
    spectrum: Spectrum | None = None
    """Of the change, where it was asked for."""


@torch.no_grad()
def decompose(before: Source, after: Source, spectra: bool = False) -> dict[str, Decomposition]:
    """Magnitude and direction change of every weight that two models have in common.

    Args:
        before, after: models or state dicts. A model's active adapter counts as part of its weights, so
            ``decompose(base, adapted)`` needs no merging. Weights of linear layers, embeddings and convolutions of a
            model are taken as an adapter would see them; in a state dict every weight of two or more dimensions counts,
            and its first dimension is the rows.
        spectra: look at the singular values of each change as well, which takes longer.

    Returns:
        For each weight's path (without ".weight") how far it moved. Sums are float64, a few rows at a time.

    Raises:
        AdapterError: if the two have no weight in common, or listing those whose shapes differ.
    """
    old, new = _weights(before, "before"), _weights(after, "after")
    common = [path for path in old if path in new]
    if not common:
        raise AdapterError(
            f"decompose: the two have no weight in common; before has {some(old)}, after has {some(new)}"
        )
    problems = [
        f"{path}: before {old[path].shape}, after {new[path].shape}"
        for path in common
        if old[path].shape != new[path].shape
    ]
    if problems:
        raise AdapterError.of("decompose: shapes differ", problems)
    return {path: _measure(old[path], new[path], spectra) for path in common}


@torch.no_grad()
def adapter_change(model: nn.Module, spectra: bool = False) -> dict[str, Decomposition]:
    """How far the active adapter moves each layer that it adapts, from the base weight in the same model.

    Raises:
        AdapterError: if no adapter is active.
    """
    layers = {path: layer for path, layer in adapted_layers(model).items() if layer.active is not None}
    if not layers:
        raise AdapterError("adapter_change: no adapter is active on the model")
    return {path: _measure(_of_rows(layer.weight_rows()), _of_layer(layer), spectra) for path, layer in layers.items()}


def _measure(old: Matrix, new: Matrix, spectra: bool) -> Decomposition:
    return moved(old, new, BaseSpectrum(old) if spectra and has_spectrum(old) else None)


def has_spectrum(weight: Matrix) -> bool:
    """Whether a weight is one matrix, small enough for its spectrum, and more than a single row or column."""
    rows, columns = weight.shape
    return weight.matrices == 1 and min(rows, columns) > 1 and rows * columns <= LARGEST


def moved(old: Matrix, new: Matrix, base: BaseSpectrum | None = None) -> Decomposition:
    """Compare a weight before and after, with its spectrum where that of the base is given."""
    magnitude = direction = norm = by_magnitude = by_direction = before = 0.0
    for rows in old.slices():
        w, v = old.rows(rows), new.rows(rows)
        m, n = w.norm(dim=1), v.norm(dim=1)
        product = m * n
        longer = (n - m).square()
        turned = ((v - w).square().sum(1) - longer).clamp(min=0)  # 2 |w'| |w| (1 - cos): exact for small angles, too
        # Of two rows that are both zero none has turned; a row that came from zero or went there points nowhere.
        angle = torch.where(product > 0, turned / (2 * product).where(product > 0, 1.0), (m != n).to(m.dtype))
        magnitude += float((n - m).abs().sum())
        direction += float(angle.clamp(max=2).sum())
        norm += float(m.sum())
        by_magnitude += float(longer.sum())
        by_direction += float(turned.sum())
        before += float(m.square().sum())
    count, change = old.shape[0], by_magnitude + by_direction
    if not math.isfinite(change):
        nan = math.nan
        return Decomposition(nan, nan, nan, count, nan, nan, nan)
    return Decomposition(
        magnitude=magnitude / count,
        direction=direction / count,
        relative_magnitude=magnitude / norm if norm else 0.0,
        rows=count,
        size=math.sqrt(change),
        relative_size=math.sqrt(change / before) if before else 0.0,
        magnitude_share=by_magnitude / change if change else 0.0,
        spectrum=base.of(new) if base is not None and change else None,
    )


def _weights(source: Source, which: str) -> dict[str, Matrix]:
    if isinstance(source, nn.Module):
        return weights_of(source)
    if any(".base_layer." in key for key in source):
        raise AdapterError(f"decompose: {which} is the state dict of a model with adapters; give the model itself")
    return {
        key.removesuffix(".weight"): Matrix.of(tensor.detach().flatten(1))
        for key, tensor in source.items()
        if tensor.ndim > 1 and tensor.is_floating_point()
    }


def weights_of(model: nn.Module) -> dict[str, Matrix]:
    """The weights of a model as adapters see them, its active adapter counted in; read when rows are asked for."""
    root = unwrap(model)
    held: dict[str, AdapterHolder] = {**adapted_layers(root), **saved_modules(root)}
    found: dict[str, Matrix] = {}
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
    if not isinstance(holder, SavedModule):
        return module
    return holder.chosen().get_submodule(path.removeprefix(holder.path).lstrip("."))


def _of_rows(weight: WeightRows) -> Matrix:
    return Matrix(weight.shape, _Walk(weight), weight.matrices)


class _Walk:
    """Rows of W, slice after slice: tiles that are made for the occasion are made once, from first row to last."""

    def __init__(self, weight: WeightRows) -> None:
        self.weight = weight
        self._begin()

    def _begin(self) -> None:
        self.tiles: Iterator[tuple[slice, Tensor]] = iter(())
        self.outer, self.tile = slice(0, 0), torch.empty(0)

    def __call__(self, rows: slice) -> Tensor:
        """Those rows in float64."""
        if rows.start < self.outer.start or self.outer.stop == 0:
            self.tiles = iter(self.weight.tiles())
            self.outer, self.tile = next(self.tiles)
        parts = []
        while True:
            start, stop = max(rows.start, self.outer.start), min(rows.stop, self.outer.stop)
            if start < stop:
                parts.append(self.tile[start - self.outer.start : stop - self.outer.start].double())
            if rows.stop <= self.outer.stop:
                break
            self.outer, self.tile = next(self.tiles)
        if rows.stop == self.weight.shape[0]:
            self._begin()  # nothing of W's size stays, and the next walk sees W as it is then
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _of_layer(layer: AdaptedLayer) -> Matrix:
    """``W'`` of the active adapter."""
    weight = _of_rows(layer.weight_rows())
    name = layer.active
    if name is None or not layer.enabled:
        return weight
    A, B, m = (None if part is None else part.detach() for part in layer.whole_parts(name))
    return adapted(weight, A, B, m, layer.adapters[name].scale, zero_m_is_plain=True)
