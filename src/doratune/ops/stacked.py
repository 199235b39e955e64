"""Matrices of one shape under each other, seen as one W ``[count out, in]``: of each one A is its own.

A is ``[count r, in]`` and B ``[count out, r]``, so that their shapes tell how many there are; of a single matrix they
are what they always are.
"""

from __future__ import annotations

import torch
from torch import Tensor


def count_of(A: Tensor, B: Tensor) -> int:
    """How many matrices lie under each other."""
    return A.shape[0] // B.shape[1]


def each(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A ``[count, r, in]`` and B ``[count, out, r]``, as views."""
    count = count_of(A, B)
    return A.unflatten(0, (count, -1)), B.unflatten(0, (count, -1))


def own_factor(A: Tensor, B: Tensor, rows: slice) -> Tensor:
    """The A ``[r, in]`` that changes these rows of W, all of one matrix."""
    count, rank = count_of(A, B), B.shape[1]
    if count == 1:
        return A
    index = rows.start // (B.shape[0] // count)
    return A[index * rank : (index + 1) * rank]


def low_rank_rows(A: Tensor, B: Tensor, rows: slice) -> Tensor:
    """``(B A)[rows]``; the rows may be of several matrices."""
    count = count_of(A, B)
    if count == 1:
        return B[rows] @ A
    size, parts, start = B.shape[0] // count, [], rows.start
    while start < rows.stop:
        here = slice(start, min(rows.stop, (start // size + 1) * size))
        parts.append(B[here] @ own_factor(A, B, here))
        start = here.stop
    return torch.cat(parts)
