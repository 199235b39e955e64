"""The change that an adapter makes, and the low-rank change nearest to it, against float64's whole decomposition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from doratune.ops import approximation, reference


def adapted(out, columns, rank=4, spread=0.01, seed=0):
    """W, A, B and g of rows whose lengths were trained, too."""
    generator = torch.Generator().manual_seed(seed)

    def new(*shape):
        return torch.randn(shape, generator=generator)

    return new(out, columns) * 0.05, new(rank, columns) * columns**-0.5, new(out, rank) * 0.02, 1 + spread * new(out)


def best(D, rank):
    """The share of ``|D|^2`` that no ``B A`` of this rank exceeds."""
    squares = torch.linalg.svdvals(D.double()).square()
    return float(squares[:rank].sum() / squares.sum())


def kept(D, rank):
    A, B = approximation.nearest_low_rank(D, rank)
    assert A.shape == (rank, D.shape[1])
    assert B.shape == (D.shape[0], rank)
    return 1 - approximation.squared_error(D, A, B) / approximation.squared_size(D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_change_keeps_its_digits(dtype):
    W, A, B, g = adapted(24, 40, spread=1e-4)
    W = W.to(dtype)
    exact = g.double()[:, None] * reference.lora_weight(W.double(), A.double(), B.double(), 1.5) - W.double()
    for a, b, expected in ((A, B, exact), (None, None, (g.double() - 1)[:, None] * W.double())):
        D = approximation.weight_change(W, a, b, g, 1.5)
        assert D.dtype == torch.float32
        assert (D - expected).norm() < 1e-6 * expected.norm()


@given(
    out=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(1, 50),
    spread=st.sampled_from([0.0, 0.01, 0.5]),
    seed=st.integers(0, 99),
)
def test_nothing_of_the_same_rank_comes_nearer(out, columns, rank, spread, seed):
    W, A, B, g = adapted(out, columns, spread=spread, seed=seed)
    D = approximation.weight_change(W, A, B, g, 2.0)
    assert kept(D, rank) == pytest.approx(best(D, rank), abs=1e-5)


@pytest.mark.parametrize("rank", [4, 16, 64])
@pytest.mark.parametrize("spread", [0.01, 0.1], ids=["little moved magnitudes", "far moved magnitudes"])
@pytest.mark.parametrize("shape", [(640, 700), (1300, 600)])
def test_of_large_matrices_too(shape, spread, rank):
    assert min(shape) > approximation.EXACT
    W, A, B, g = adapted(*shape, spread=spread)
    D = approximation.weight_change(W, A, B, g, 2.0)
    assert best(D, rank) - 5e-4 < kept(D, rank) < best(D, rank) + 1e-5


def test_a_magnitude_alone_whose_spectrum_is_the_flattest():
    W, _, _, g = adapted(640, 700, spread=0.1)
    D = approximation.weight_change(W, None, None, g, 0.0)
    assert best(D, 16) < 0.25
    assert best(D, 16) - 5e-4 < kept(D, 16)


def test_the_same_every_time_and_no_number_drawn():
    D = torch.randn(600, 600, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    first, again = approximation.nearest_low_rank(D, 8), approximation.nearest_low_rank(D, 8)
    assert all(map(torch.equal, first, again))
    assert torch.equal(torch.get_rng_state(), before)


def test_beyond_the_shorter_side_nothing_is_lost_and_the_rest_is_zero():
    D = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    A, B = approximation.nearest_low_rank(D, 8)
    torch.testing.assert_close(B @ A, D, rtol=1e-5, atol=1e-5)
    assert not A[3:].any()
    assert not B[:, 3:].any()


def test_no_change_is_no_change():
    A, B = approximation.nearest_low_rank(torch.zeros(600, 700), 4)
    assert not (B @ A).any()
