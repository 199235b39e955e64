"""The singular spectrum of a change, its effective rank, and the directions that are new in the changed weight.

A weight whose smaller side has up to ``EXACT`` rows or columns is decomposed whole, through its Gram matrix; an
adapter's low-rank change through its factors. Of larger ones the leading singular values and vectors come from a
randomised decomposition (Halko et al., arXiv 0909.4061: ``torch.svd_lowrank``, fixed seed).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from doratune.study.matrix import Matrix

EXACT = 1024
"""Smaller side up to which nothing is approximated."""
LEADING = 64
"""Singular values of a change that are kept."""
LOOKED_AT = 10
"""Leading singular vectors of the changed weight that are compared with the base's."""
COMPARED = 128
"""Leading singular vectors of a large base that they are compared with; of a small one it is all."""
SIMILAR = 0.5
"""Absolute cosine with a singular vector of the base below which one of the changed weight is an intruder."""
ITERATIONS = 4
LARGEST = 1 << 28
"""Numbers of a weight above which no spectrum is made: it would take gigabytes."""


@dataclass(frozen=True)
class Spectrum:
    """What one weight's change is made of."""

    values: tuple[float, ...]
    """Leading singular values of the change, largest first."""
    effective_rank: float
    """``exp`` of the entropy of the singular values as shares of their sum (Roy & Vetterli, 2007). Where only the
    leading ones are known, the rest of the change is spread evenly over the others: an upper bound."""
    intruders: int
    """Intruder dimensions (arXiv 2410.21228): how many of the changed weight's 10 leading left singular vectors have a
    cosine below 0.5 with every one of the base's (with its 128 leading ones, where the weight is large)."""
    similarities: tuple[float, ...]
    """The largest such cosine of each of the 10."""
    exact: bool
    """Whether nothing was approximated."""


class BaseSpectrum:
    """A base weight, and its left singular vectors for all that is compared with it."""

    def __init__(self, base: Matrix) -> None:
        self.base = base

    @cached_property
    def vectors(self) -> Tensor:
        """Left singular vectors, computed when something is first compared: of a weight with NaN there are none."""
        return left_vectors(self.base.dense(), None)

    def of(self, after: Matrix) -> Spectrum:
        """Look at a changed weight: in float32, its change in float64 where that is exact."""
        values, effective_rank, exact = change_values(self.base, after)
        leading = left_vectors(after.dense(), LOOKED_AT)
        if self.vectors.shape[1]:
            cosines = (self.vectors.T @ leading).abs().amax(0).clamp(max=1.0).tolist()
        else:
            cosines = [0.0] * leading.shape[1]  # a base of zeros has no directions
        intruders = sum(cosine < SIMILAR for cosine in cosines)
        whole = exact and min(after.shape) <= EXACT
        return Spectrum(tuple(values[:LEADING]), effective_rank, intruders, tuple(cosines), whole)


def left_vectors(W: Tensor, count: int | None) -> Tensor:
    """Leading left singular vectors ``[out, count]`` of W, float32; None: all that belong to a value above 0.

    Of a large W they are approximate, and None means the ``COMPARED`` leading ones.
    """
    rows, columns = W.shape
    if min(rows, columns) > EXACT:
        return _low_rank(W, COMPARED + LOOKED_AT)[0][:, : count or COMPARED]
    # Vectors of W W^T, or those of W^T W sent through W. Those below 3e-4 of the largest value get mixed up in float32:
    # never a leading one, but a direction of the base that training made leading can look new.
    squared, vectors = torch.linalg.eigh(W @ W.T if rows <= columns else W.T @ W)
    squared, vectors = squared.flip(0), vectors.flip(1)
    kept = min(count or len(squared), int((squared > squared[0] * 1e-12).sum()))
    vectors = vectors[:, :kept]
    return vectors if rows <= columns else torch.nn.functional.normalize(W @ vectors, dim=0)


def change_values(before: Matrix, after: Matrix) -> tuple[list[float], float, bool]:
    """Singular values of the change, largest first, its effective rank, and whether both are exact."""
    if after.factors is not None:
        B, A = after.factors
        values = torch.linalg.svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T).tolist()
        return values, effective_rank(values), True
    change = after.dense(before)
    if min(change.shape) > EXACT:
        values = _low_rank(change, LEADING + LOOKED_AT)[1][:LEADING].double().tolist()
        rest = max(0.0, float(change.norm()) ** 2 - sum(value**2 for value in values))
        others = min(change.shape) - len(values)
        return values, effective_rank(values + [math.sqrt(rest / others)] * others), False
    wide = change.double() if change.shape[0] <= change.shape[1] else change.T.double()
    values = torch.linalg.eigvalsh(wide @ wide.T).flip(0).clamp(min=0).sqrt().tolist()
    return values, effective_rank(values), True


def effective_rank(values: list[float]) -> float:
    """``exp(entropy)`` of the values as shares of their sum; 0 where all are 0."""
    total = sum(values)
    if not total:
        return 0.0
    return math.exp(-sum(p * math.log(p) for value in values if (p := value / total) > 0))


def _low_rank(W: Tensor, count: int) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # the CPU's alone: training may go on on a GPU
        U, S, _ = torch.svd_lowrank(W, q=min(count, *W.shape), niter=ITERATIONS)
    return U, S
