import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from doratune.study import spectrum
from doratune.study.matrix import Matrix, adapted
from doratune.study.spectrum import BaseSpectrum, effective_rank, left_vectors


def decaying(rows, columns, seed=0):
    """A matrix whose singular values have gaps, as those of trained weights do."""
    generator = torch.Generator().manual_seed(seed)
    n = min(rows, columns)
    U = torch.linalg.qr(torch.randn(rows, n, generator=generator).double()).Q
    V = torch.linalg.qr(torch.randn(columns, n, generator=generator).double()).Q
    return U @ torch.diag(0.8 ** torch.arange(n).double()) @ V.T, U


def look(before, after):
    return BaseSpectrum(Matrix.of(before)).of(after if isinstance(after, Matrix) else Matrix.of(after))


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (24, 24)])
def test_against_a_full_float64_decomposition(shape):
    before, after = torch.randn(shape), torch.randn(shape)
    found = look(before, after)
    values = torch.linalg.svdvals(after.double() - before.double())
    assert found.values == pytest.approx(values.tolist(), rel=1e-5)
    shares = values / values.sum()
    assert found.effective_rank == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-5)
    assert found.exact
    u0, u1 = (torch.linalg.svd(w.double(), full_matrices=False).U for w in (before, after))
    cosines = (u0.T @ u1[:, :10]).abs().amax(0)
    assert found.similarities == pytest.approx(cosines.tolist(), abs=1e-3)
    assert found.intruders == int((cosines < 0.5).sum())


@given(st.integers(1, 6), st.integers(7, 20), st.integers(7, 20))
def test_a_change_of_equal_singular_values_has_its_rank_as_effective_rank(rank, rows, columns):
    W, _ = decaying(rows, columns)
    U = torch.linalg.qr(torch.randn(rows, rank).double()).Q
    V = torch.linalg.qr(torch.randn(columns, rank).double()).Q
    found = look(W, W + 0.3 * U @ V.T)
    assert found.effective_rank == pytest.approx(rank, rel=1e-4)
    assert found.values[:rank] == pytest.approx([0.3] * rank, rel=1e-4)


def test_effective_rank_by_hand():
    assert effective_rank([0.0, 0.0]) == 0
    assert effective_rank([5.0, 0.0]) == pytest.approx(1)
    assert effective_rank([0.75, 0.25]) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


@pytest.mark.parametrize("large", [False, True], ids=["exact", "randomised"])
def test_a_planted_intruder_is_found_and_a_small_change_is_none(monkeypatch, large):
    if large:
        monkeypatch.setattr(spectrum, "EXACT", 16)
        monkeypatch.setattr(spectrum, "COMPARED", 24)
        monkeypatch.setattr(spectrum, "LEADING", 24)
    W, U = decaying(60, 50)
    outside = torch.linalg.qr(torch.cat([U, torch.randn(60, 1).double()], 1)).Q[:, -1:]  # no base vector is like it
    row = torch.nn.functional.normalize(torch.randn(1, 50).double(), dim=1)
    assert look(W, W * 1.01).intruders == 0
    assert look(W, W + 1e-3 * outside @ row).intruders == 0
    found = look(W, W + 2.0 * outside @ row)
    assert found.intruders == 1
    assert found.similarities[0] < 0.5
    assert found.exact == (not large)


def test_low_rank_factors_and_the_dense_change_agree():
    W, _ = decaying(40, 30)
    A, B = torch.randn(4, 30), torch.randn(40, 4) * 0.1
    by_factors = look(W, adapted(Matrix.of(W), A, B, None, 0.5))
    dense = look(W, W + 0.5 * B.double() @ A.double())
    assert len(by_factors.values) == 4
    assert by_factors.values == pytest.approx(dense.values[:4], rel=1e-5)
    assert by_factors.effective_rank == pytest.approx(dense.effective_rank, rel=1e-3)
    assert by_factors.similarities == pytest.approx(dense.similarities, abs=1e-4)


def test_the_randomised_way_is_close_to_the_exact_one(monkeypatch):
    W, _ = decaying(200, 150)
    change, _ = decaying(200, 150, seed=1)
    after = W + 0.2 * change
    exact = look(W, after)
    monkeypatch.setattr(spectrum, "EXACT", 16)
    rough = look(W, after)
    assert not rough.exact
    assert rough.values[:20] == pytest.approx(exact.values[:20], rel=1e-3)
    assert exact.effective_rank <= rough.effective_rank * (1 + 1e-3) < exact.effective_rank * 1.2
    assert rough.similarities == pytest.approx(exact.similarities, abs=2e-2)
    state = torch.get_rng_state()
    assert look(W, after) == rough, "the seed is fixed"
    assert torch.equal(torch.get_rng_state(), state), "and others' random numbers stay"


def test_left_vectors_of_a_matrix_with_zero_rows():
    W = torch.zeros(6, 4)
    W[0, 0], W[1, 1] = 2.0, 1.0
    vectors = left_vectors(W, None)
    assert vectors.shape == (6, 2)
    assert vectors.abs() == pytest.approx(torch.eye(6)[:, :2].numpy(), abs=1e-6)


def test_everything_is_new_to_a_base_of_zeros():
    found = BaseSpectrum(Matrix.of(torch.zeros(12, 6))).of(Matrix.of(torch.eye(12, 6)))
    assert found.intruders == len(found.similarities) == 6
    assert set(found.similarities) == {0.0}


def test_random_numbers_of_training_are_left_alone(monkeypatch):
    monkeypatch.setattr(spectrum, "EXACT", 16)
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before, after = torch.randn(100, 90), torch.randn(100, 90)
    state = torch.get_rng_state()
    assert not look(before, after).exact
    assert torch.equal(torch.get_rng_state(), state)
    assert not seeded, "a GPU's dropout would begin anew"
