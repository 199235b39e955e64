"""An adapter's whole change of a weight, magnitude and all, and the plain low-rank change that is nearest to it.

Shapes: W and D ``[out, in]``, A ``[r, in]``, B ``[out, r]``, g ``[out]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 512
"""Shorter side of a matrix up to which its singular vectors are computed whole."""
ITERATIONS = 6
"""Of the randomised decomposition, which works with twice the vectors asked for, and at least 16 more: what a flat
spectrum, as a magnitude's, needs to be within 1e-3 of the best."""


def weight_change(W: Tensor, A: Tensor | None, B: Tensor | None, g: Tensor, scale: float) -> Tensor:
    """``D = W' - W = (g - 1) W + g s B A``, float32; without the digits that a difference of W' and W would lose."""
    D = W.float() * (g - 1)[:, None]
    return D if A is None or B is None else D.addmm_(B * (g * scale)[:, None], A)


def nearest_low_rank(D: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of rank r whose ``B A`` is nearest to D, of any shape: its truncated SVD (Eckart and Young, 1936).

    Each takes the root of the singular values. Rows and columns that D's shorter side does not fill are 0.
    """
    U, S, V = _leading(D, rank)
    found = len(S)
    root = S.sqrt()
    A, B = D.new_zeros(rank, D.shape[1]), D.new_zeros(D.shape[0], rank)
    torch.mul(V, root[:, None], out=A[:found])
    B[:, :found] = U * root
    return A, B


def _leading(D: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular vectors and values; of large matrices by a randomised decomposition (arXiv 0909.4061).

    Its seed is fixed, and torch's own generators are left alone, which ``torch.svd_lowrank`` would draw from.
    """
    width = count + max(count, 16)
    if min(D.shape) <= max(EXACT, width):
        U, S, V = torch.linalg.svd(D, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(D.shape[1], width, generator=generator, dtype=D.dtype, device="cpu")
        Q = torch.linalg.qr(D @ start.to(D.device)).Q
        for _ in range(ITERATIONS):
            Q = torch.linalg.qr(D @ torch.linalg.qr(D.T @ Q).Q).Q
        U, S, V = torch.linalg.svd(Q.T @ D, full_matrices=False)
        U = Q @ U
    return U[:, :count], S[:count], V[:count]


def squared_size(D: Tensor) -> float:
    """``|D|^2``, the sum of all squares."""
    return float(torch.linalg.vector_norm(D, dim=1).square().sum())


def squared_error(D: Tensor, A: Tensor, B: Tensor) -> float:
    """``|D - B A|^2``."""
    return squared_size(torch.addmm(D, B, A, alpha=-1))
