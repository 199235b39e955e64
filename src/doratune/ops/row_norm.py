"""The norm of every row of ``W + s B A`` without ever forming that matrix.

Row by row (``<,>`` is the product of two rows)::

    n^2 = |W|^2 + 2 s <B, W A^T> + s^2 <B (A A^T), B>

``|W|^2`` is constant for a frozen weight; ``W A^T`` is a skinny product, worth r tokens of arithmetic. The formula is
differentiable as it stands, and its gradient stays factored: that is the paper's exact gradient (eq. 6).

W comes as *tiles*: an iterable of ``(rows, W[rows])``. A dense weight is one tile, a quantised one a generator that
dequantises a few rows at a time, so that nothing of size ``[out, in]`` is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from doratune.ops.hardware import sums_stay_wide
from doratune.ops.once import by_hand, once_differentiable
from doratune.ops.stacked import count_of, each, own_factor

TILE_BYTES = {"cpu": 16 * 1024 * 1024}
LARGE_TILE_BYTES = 40 * 1024 * 1024
"""Size of a transient float32 tile of W, by type of device. On GPUs starting an operation costs more: larger tiles."""

Tiles = Callable[[], Iterable[tuple[slice, Tensor]]]
"""A function that walks W once more, as ``(rows, W[rows])``. Where W is not there in rows it may also be an object
with ``squared()`` and ``product(A)``, which find ``|W|^2`` and ``W A^T`` in a shorter way."""


def row_tiles(shape: Sequence[int], device: torch.device) -> Iterator[slice]:
    """Slices of a matrix's rows whose float32 copy fits into a tile on the device."""
    rows, columns = shape
    step = max(1, TILE_BYTES.get(device.type, LARGE_TILE_BYTES) // (4 * max(1, columns)))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def base_squared_norm(tiles: Tiles) -> Tensor:
    """``|W|^2`` of each row, float32 ``[out]``, summed in float32 by row tiles."""
    if hasattr(tiles, "squared"):
        shorter: Tensor = tiles.squared()
        return shorter
    sums = []
    for _, tile in tiles():
        for rows in row_tiles(tile.shape, tile.device):
            sums.append(tile[rows].to(torch.float32, copy=True).square_().sum(1))
    return torch.cat(sums)


SMALL = 512 * 512
"""Up to this many elements a float32 copy of a 16-bit tile costs less than starting more products."""


def _tiled_product(A: Tensor, tiles: Tiles) -> Tensor:
    products, parts = [], None
    for _, tile in tiles():
        if tile.dtype not in (torch.float16, torch.bfloat16):
            products.append((tile @ A.to(tile.dtype).mT).float())
        elif tile.numel() <= SMALL:
            products.append(tile.float() @ A.mT)
        else:
            parts = _in_two_parts(A, tile.dtype) if parts is None else parts
            products.append(_product(tile, parts))
    return products[0] if len(products) == 1 else torch.cat(products)


def _in_two_parts(A: Tensor, dtype: torch.dtype) -> Tensor:
    """A rounded to 16 bits, ``[r, in]``, and below it what rounding took, so that a 16-bit W (large) stays as it is."""
    rank = A.shape[-2]
    parts = A.new_empty((*A.shape[:-2], 2 * rank, A.shape[-1]), dtype=dtype)
    high, low = parts.split(rank, -2)
    low.copy_(A - high.copy_(A))
    return parts


def _product(tile: Tensor, parts: Tensor) -> Tensor:
    """``tile A^T`` in float32 for an A in two parts, all of 16 bits, also of batches."""
    rank, batch = parts.shape[-2] // 2, tile.ndim == 3
    if sums_stay_wide(tile.device):
        both = (torch.bmm if batch else torch.mm)(tile, parts.mT, out_dtype=torch.float32)
        return both[..., :rank] + both[..., rank:]
    both = tile @ parts.mT
    rounded = both[..., :rank]
    U = rounded.float() + both[..., rank:]
    # What rounding to 16 bits took from the product: the product computed again, less its rounded value.
    U += (torch.baddbmm if batch else torch.addmm)(rounded, tile, parts[..., :rank, :].mT, beta=-1)
    return U


class _TiledProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor, tiles: Tiles) -> Tensor:
        ctx.tiles = tiles
        ctx.like = A
        return _tiled_product(A, tiles)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dU: Tensor) -> tuple[Tensor, None]:
        dA = torch.zeros_like(ctx.like)
        for rows, tile in ctx.tiles():
            dA += (dU[rows].to(tile.dtype).mT @ tile).to(dA.dtype)
        return dA, None


def skinny_product(tiles: Tiles, A: Tensor) -> Tensor:
    """``U = W A^T``, float32 ``[out, r]``, for A of float32; the backward walks the tiles again, keeping none."""
    if hasattr(tiles, "product"):
        shorter: Tensor = tiles.product(A)
        return shorter
    return _TiledProduct.apply(A, tiles) if by_hand() else _tiled_product(A, tiles)


def squared_row_norm(base_squared: Tensor, tiles: Tiles, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``n^2 = |W + s B A|^2`` of each row, float32 ``[out]``; where W and s B A cancel, rounding may leave it below 0.

    Args:
        base_squared: ``|W|^2``, float32 ``[out]`` (``base_squared_norm``).
        tiles: W, ``[out, in]``, tile by tile.
        A, B: float32 ``[r, in]`` and ``[out, r]``, or of matrices under each other (``ops/stacked.py``).
        scale: s.

    Differentiable with respect to A and B; run it under ``torch.no_grad`` for the detached norm.
    """
    A, B = A.float(), B.float()
    U = skinny_product(tiles, A)
    if count_of(A, B) == 1:
        change = (B * torch.addmm(U, B, A @ A.T, beta=2, alpha=scale)).sum(1)
    else:
        A3, B3 = each(A, B)
        change = (B * torch.baddbmm(U.view_as(B3), B3, A3 @ A3.mT, beta=2, alpha=scale).view_as(B)).sum(1)
    return torch.add(base_squared, change, alpha=scale)


def dense_squared_norm(tiles: Tiles, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``n^2`` by forming ``W + s B A`` tile by tile: slower, exact also where W and s B A nearly cancel."""
    A, B = A.float(), B.float()
    sums = []
    for outer, tile in tiles():
        update, factor = B[outer], scale * own_factor(A, B, outer)
        for rows in row_tiles(tile.shape, tile.device):
            sums.append((update[rows] @ factor).add_(tile[rows]).square_().sum(1))
    return torch.cat(sums)


def row_scale(magnitude: Tensor, squared_norm: Tensor, base_squared: Tensor | None) -> Tensor:
    """``g = m / n``, float32 ``[out]``; 1 on a plain row (a zero row of W whose m is 0, trained as LoRA).

    Args:
        magnitude: m, ``[out]``.
        squared_norm: ``n^2``, float32 ``[out]``; a row that rounding left below 0 is taken for 0, and n for 1.
        base_squared: ``|W|^2``, float32 ``[out]``, NaN like 0; None where all rows of W are known to be above 0.
    """
    g = magnitude.float() / torch.threshold(squared_norm, 0.0, 1.0).sqrt()
    return g if base_squared is None else torch.where((base_squared > 0) | (magnitude != 0), g, 1.0)
