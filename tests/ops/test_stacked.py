"""Matrices under each other: the same numbers as each of them by itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from doratune.ops import row_norm, stacked
from helpers import error

COUNT, OUT, IN, RANK = 3, 5, 7, 2


def made(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(COUNT, OUT, IN, generator=generator).to(dtype)
    A = torch.randn(COUNT * RANK, IN, generator=generator)
    B = torch.randn(COUNT * OUT, RANK, generator=generator)
    return W, A, B


class Tiles:
    """As an experts module's: a tile for each matrix, the product of all at once."""

    def __init__(self, W):
        self.W = W

    def __call__(self):
        return [(slice(i * OUT, (i + 1) * OUT), w) for i, w in enumerate(self.W)]

    def product(self, A):
        return row_norm.skinny_product(lambda: [(slice(0, COUNT), self.W)], A.view(COUNT, RANK, IN)).flatten(0, 1)


def test_a_single_matrix_has_the_usual_factors():
    _, A, B = made()
    assert stacked.count_of(A[:RANK], B) == 1
    assert torch.equal(stacked.low_rank_rows(A[:RANK], B, slice(2, 4)), B[2:4] @ A[:RANK])


@given(st.integers(0, COUNT * OUT - 1), st.integers(1, COUNT * OUT))
def test_any_rows_are_those_of_their_matrices(start, length):
    _, A, B = made()
    rows = slice(start, min(start + length, COUNT * OUT))
    whole = torch.cat([b @ a for a, b in zip(*stacked.each(A, B), strict=True)])
    assert error(stacked.low_rank_rows(A, B, rows), whole[rows]) < 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-4)], ids=str)
def test_norms_are_those_of_each_matrix(dtype, tolerance):
    W, A, B = made(dtype)
    tiles, A = Tiles(W), A.requires_grad_()
    base = row_norm.base_squared_norm(tiles)
    found = row_norm.squared_row_norm(base, tiles, A, B, 0.5)
    alone = [w.double() + 0.5 * b.double() @ a.double() for w, a, b in zip(W, *stacked.each(A, B), strict=True)]
    expected = torch.cat([v.square().sum(1) for v in alone])
    assert error(found, expected) < tolerance
    assert error(row_norm.dense_squared_norm(tiles, A.detach(), B, 0.5), expected) < 1e-6
    found.sum().backward()
    assert error(A.grad, torch.autograd.grad(expected.sum(), A)[0]) < 100 * tolerance
