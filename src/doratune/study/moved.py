"""Adapters as training leaves them, without training: fresh ones (B = 0, m = n) would hide costs and mistakes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from doratune.ops.stacked import each, own_factor

DIRECTION = 0.5
"""Size of ``s B A`` relative to W, in the Frobenius norm."""
MAGNITUDE = 0.1
"""Standard deviation of ``m / n``."""
STEPS = 8
"""After so many rounds the values repeat."""


@dataclass(frozen=True)
class MovedAdapter:
    """A ``[r, in]``, B ``[out, r]``, m ``[out]`` of one layer; float32 holding numbers that bfloat16 has, too."""

    A: Tensor
    B: Tensor
    m: Tensor

    def at(self, round_number: int) -> MovedAdapter:
        """The values of one round: a little different from those of the round before."""
        return MovedAdapter(*(_rounded(t * round_factor(round_number)) for t in (self.A, self.B, self.m)))


def round_factor(round_number: int) -> float:
    """By how much an adapter's values differ in a round from those of round 0."""
    return 1 + (round_number % STEPS) / 64


def moved_adapter(
    tiles: Iterable[tuple[slice, Tensor]], shape: tuple[int, int], rank: int, scale: float, seed: int, count: int = 1
) -> MovedAdapter:
    """Random values for a layer, the same for everyone who asks with the same seed.

    Args:
        tiles: W by rows.
        shape: ``[out, in]`` of W.
        rank: at least 1.
        scale: s.
        seed: of the random numbers, which are drawn on the CPU.
        count: how many matrices lie under each other in W.
    """
    generator = torch.Generator().manual_seed(seed)
    out, columns = shape
    tiles = list(tiles)
    device = tiles[0][1].device
    A = _rounded((torch.rand(count * rank, columns, generator=generator) * 2 - 1) * columns**-0.5).to(device)
    B = torch.randn(out, rank, generator=generator).to(device)
    noise = torch.randn(out, generator=generator).to(device)
    size = torch.stack([W.float().norm() for _, W in tiles]).norm()
    # |B A|^2 = <B^T B, A A^T>, without the product
    A3, B3 = each(A, B)
    change = scale * ((B3.mT @ B3) * (A3 @ A3.mT)).sum().sqrt()
    B = _rounded(B * (DIRECTION * size / change))
    n = torch.cat(
        [torch.addmm(W.float(), B[rows], own_factor(A, B, rows), alpha=scale).norm(dim=1) for rows, W in tiles]
    )
    return MovedAdapter(A, B, _rounded(n * (1 + MAGNITUDE * noise)))


def _rounded(t: Tensor) -> Tensor:
    """Numbers that are the same in bfloat16, so that adapters of either dtype start equal."""
    return t.bfloat16().float()
