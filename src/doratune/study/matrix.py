"""One weight as ``[out, in]``, one row per magnitude, read a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from doratune.ops.stacked import count_of, low_rank_rows

TILE = 1 << 17
"""Numbers that are looked at at a time: they stay in a core's cache through several passes."""

HELD = 1 << 22
"""Numbers of a weight up to which ``held`` keeps it: 32 MiB."""


@dataclass(frozen=True)
class Matrix:
    """One weight; nothing of it is read before rows are asked for."""

    shape: tuple[int, int]
    rows: Callable[[slice], Tensor]
    """Rows in float64."""
    matrices: int = 1
    """How many matrices lie under each other in it (``ops/stacked.py``)."""
    factors: tuple[Tensor, Tensor] | None = None
    """``[out, r]`` and ``[r, in]``, float64, where the weight is the one before plus their product."""

    @classmethod
    def of(cls, matrix: Tensor) -> Matrix:
        """A matrix that is in memory, or mapped into it."""
        return cls((matrix.shape[0], matrix.shape[1]), lambda rows: matrix[rows].double())

    def slices(self) -> Iterator[slice]:
        """Slices of rows, top to bottom."""
        rows, columns = self.shape
        step = max(1, TILE // max(1, columns))
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def held(self) -> Matrix:
        """The same, read once and kept in float64, if it is small."""
        if self.shape[0] * self.shape[1] > HELD:
            return self
        whole = torch.cat([self.rows(rows) for rows in self.slices()])
        return Matrix(self.shape, lambda rows: whole[rows], self.matrices, self.factors)

    def dense(self, minus: Matrix | None = None) -> Tensor:
        """All of it in float32, or its difference from another one, taken in float64."""
        whole = torch.empty(self.shape)
        for rows in self.slices():
            tile = self.rows(rows)
            whole[rows] = tile if minus is None else tile - minus.rows(rows)
        return whole


def adapted(
    base: Matrix, A: Tensor | None, B: Tensor | None, m: Tensor | None, scale: float, zero_m_is_plain: bool = False
) -> Matrix:
    """``W' = m (W + s B A) / n``, in float64 rather than as merging would round it.

    Args:
        base: W.
        A, B: ``[r, in]`` and ``[out, r]``, or of matrices under each other; None for rank 0.
        m: ``[out]``; None for LoRA.
        scale: s.
        zero_m_is_plain: a row of W that is 0, with an m of 0, is LoRA's, as in memory; in files such a row is 0.
    """
    if m is None:
        if A is None or B is None:
            return base
        b, a = scale * B.double(), A.double()
        factors = (b, a) if count_of(A, B) == 1 else None
        return Matrix(base.shape, lambda rows: base.rows(rows) + low_rank_rows(a, b, rows), base.matrices, factors)

    def read(rows: slice) -> Tensor:
        before = base.rows(rows)
        moved = before if A is None or B is None else before + scale * low_rank_rows(A.double(), B.double(), rows)
        own, n = m[rows].double(), moved.norm(dim=1)
        g = own / n.where(n > 0, 1.0)
        if zero_m_is_plain:
            g = torch.where((own == 0) & (before.norm(dim=1) == 0), 1.0, g)
        return g[:, None] * moved

    return Matrix(base.shape, read, base.matrices)
