"""The factored norm: its precision, its gradients, its corners."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from doratune.ops import reference, row_norm
from helpers import elementwise_error, error


def tensors(out, columns, rank, dtype=torch.float32, change=0.1, seed=0):
    """W in its dtype; A and B so that ``|s B A| = change * |W|`` with s = 1.5."""
    generator = torch.Generator().manual_seed(seed)

    def new(*shape):
        return torch.randn(shape, generator=generator)

    W = (new(out, columns) * 0.05).to(dtype)
    A = new(rank, columns) * columns**-0.5
    B = new(out, rank)
    size = (1.5 * B.double() @ A.double()).norm(dim=1) / W.double().norm(dim=1)
    return W, A, B * (change / size)[:, None].float()


def tiles_of(W, pieces=1):
    step = -(-W.shape[0] // pieces)
    return lambda: [
        (slice(start, min(start + step, W.shape[0])), W[start : start + step]) for start in range(0, W.shape[0], step)
    ]


def norm(W, A, B, scale=1.5, pieces=1):
    tiles = tiles_of(W, pieces)
    return row_norm.squared_row_norm(row_norm.base_squared_norm(tiles), tiles, A, B, scale).sqrt()


def exact(W, A, B, scale=1.5):
    return reference.lora_weight(W.double(), A.double(), B.double(), scale).norm(dim=1)


@pytest.mark.parametrize("change", [0.0, 0.001, 0.01, 0.1, 0.5])
@pytest.mark.parametrize("rank", [1, 4, 16, 64, 512])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-4), (torch.float16, 1e-4)], ids=str
)
@pytest.mark.parametrize("columns", [96, 768, 2048, 4096])
def test_precision(dtype, tolerance, rank, change, columns):
    W, A, B = tensors(48, columns, rank, dtype, change)
    n = norm(W, A, B)
    assert n.dtype == torch.float32
    assert elementwise_error(n, exact(W, A, B)) < tolerance
    if change >= 0.01:  # |W| alone would not pass
        assert elementwise_error(W.double().norm(dim=1), exact(W, A, B)) > 2 * tolerance


@pytest.mark.parametrize("rank", [1, 4, 16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [512, 2048, 8192])
def test_precision_where_the_change_lies_along_the_weight(dtype, rank, columns):
    """Then the product of W and A is large, and what rounding takes from it does not average out."""
    torch.manual_seed(0)
    A = torch.randn(rank, columns) * columns**-0.5
    C = torch.randn(640, rank)
    noise = torch.randn(640, columns)
    W = (noise + C @ A * noise.norm() / (C @ A).norm()).to(dtype)
    B = -0.5 * W.float() @ torch.linalg.pinv(A) / 1.5
    assert W.numel() > row_norm.SMALL
    assert elementwise_error(norm(W, A, B), exact(W, A, B)) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_where_products_keep_their_sums_one_of_them_will_do(dtype, monkeypatch):
    """As on NVIDIA's GPUs; here the product of the same numbers stands in for theirs."""
    asked = []

    def mm(tile, parts, out_dtype):
        asked.append((tile.dtype, parts.dtype, out_dtype))
        return tile.to(out_dtype) @ parts.to(out_dtype)

    monkeypatch.setattr(row_norm, "sums_stay_wide", lambda device: True)
    monkeypatch.setattr(torch, "mm", mm)
    W, A, B = tensors(640, 2048, 16, dtype, 0.5)
    assert elementwise_error(norm(W, A, B), exact(W, A, B)) < 1e-6
    assert asked == [(dtype, dtype, torch.float32)]


@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_tiles_make_no_difference(pieces):
    W, A, B = tensors(33, 40, 4)
    assert elementwise_error(norm(W, A, B, pieces=pieces), exact(W, A, B)) < 1e-6


def test_rows_are_summed_in_float32_whatever_their_length():
    W = torch.full((3, 100_000), 1e-2, dtype=torch.float16)
    (squared,) = row_norm.base_squared_norm(tiles_of(W)).unique()
    assert elementwise_error(squared, W[0].double().square().sum()) < 1e-6


def test_large_weights_are_walked_in_small_pieces(monkeypatch):
    monkeypatch.setitem(row_norm.TILE_BYTES, "cpu", 4 * 40 * 3)
    cpu = torch.device("cpu")
    assert [s.stop - s.start for s in row_norm.row_tiles((10, 40), cpu)] == [3, 3, 3, 1]
    assert [s.stop - s.start for s in row_norm.row_tiles((2, 4000), cpu)] == [1, 1]
    (tile,) = row_norm.row_tiles((2500, 4000), torch.device("cuda"))
    assert tile == slice(0, 2500)
    W, A, B = tensors(33, 40, 4)
    base = row_norm.base_squared_norm(tiles_of(W, 2))
    assert elementwise_error(base, W.double().square().sum(1)) < 1e-6
    dense = row_norm.dense_squared_norm(tiles_of(W, 2), A, B, 1.5)
    assert elementwise_error(dense.sqrt(), exact(W, A, B)) < 1e-6


@given(
    out=st.integers(1, 20),
    columns=st.integers(1, 30),
    rank=st.integers(1, 8),
    scale=st.sampled_from([0.01, 0.5, 1.0, 8.0, 100.0]),
    change=st.sampled_from([0.0, 1e-3, 0.1, 0.5, 3.0]),
    seed=st.integers(0, 1000),
    pieces=st.integers(1, 4),
)
def test_any_shape(out, columns, rank, scale, change, seed, pieces):
    W, A, B = tensors(out, columns, rank, change=change, seed=seed)
    B = B * (1.5 / scale)
    n = norm(W, A, B, scale, pieces)
    expected = exact(W, A, B, scale)
    # Near cancellation digits are lost, which is what the dense form is for.
    kept = expected / W.double().norm(dim=1)
    assert (((n - expected).abs() / expected)[kept > 0.3] < 5e-6).all()
    dense = row_norm.dense_squared_norm(tiles_of(W, pieces), A, B, scale).sqrt()
    assert (((dense - expected).abs() / expected)[kept > 0.01] < 1e-4).all()


def test_near_cancellation_the_dense_form_keeps_its_digits():
    torch.manual_seed(0)
    A = torch.randn(6, 6)
    B = torch.randn(9, 6)
    W = -1.5 * (B.double() @ A.double()).float() * (1 + 1e-3)
    expected = exact(W, A, B)
    assert (expected < 2e-3 * W.double().norm(dim=1)).all()
    dense = row_norm.dense_squared_norm(tiles_of(W), A, B, 1.5).sqrt()
    assert elementwise_error(dense, expected) < 2e-3
    assert elementwise_error(norm(W, A, B), expected) > 1e-2  # the reason for having it


def test_total_cancellation_is_zero_within_rounding_and_never_nan():
    W, A, B = tensors(9, 12, 3)
    W = -1.5 * B @ A
    A.requires_grad_(), B.requires_grad_()
    base = row_norm.base_squared_norm(tiles_of(W))
    factored = row_norm.squared_row_norm(base, tiles_of(W), A, B, 1.5)
    assert (factored < 0).any()  # or the scale has nothing to see to
    for squared in (factored, row_norm.dense_squared_norm(tiles_of(W), A, B, 1.5)):
        assert (squared.abs() <= 1e-5 * base).all()
        g = row_norm.row_scale(torch.ones(9), squared, base)
        assert torch.isfinite(g).all()
        assert all(torch.isfinite(d).all() for d in torch.autograd.grad(g.sum(), (A, B)))


@pytest.mark.parametrize("pieces", [1, 3])
def test_the_exact_gradient(pieces):
    W, A, B = tensors(17, 23, 4, change=0.5)
    dn = torch.randn(17)
    A1, B1 = (t.clone().requires_grad_() for t in (A, B))
    found = torch.autograd.grad(norm(W, A1, B1, pieces=pieces), (A1, B1), dn)
    A2, B2 = (t.double().requires_grad_() for t in (A, B))
    expected = torch.autograd.grad((W.double() + 1.5 * B2 @ A2).norm(dim=1), (A2, B2), dn.double())
    for f, e in zip(found, expected, strict=True):
        assert error(f, e) < 1e-5


def test_nothing_dense_is_kept_for_the_exact_gradient():
    W, A, B = tensors(64, 80, 4, torch.bfloat16)
    A.requires_grad_(), B.requires_grad_()
    tiles = tiles_of(W, 4)
    base = row_norm.base_squared_norm(tiles)
    kept = []

    def pack(t):
        kept.append((tuple(t.shape), t.dtype))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        row_norm.squared_row_norm(base, tiles, A, B, 1.5).sum()
    assert sum(torch.Size(shape).numel() for shape, _ in kept) < 64 * 80 // 2


def test_the_scale_of_a_row():
    base = torch.tensor([4.0, 0.0, 0.0, 4.0, 0.0])
    squared = torch.tensor([9.0, 0.0, 4.0, 0.0, 0.0])
    m = torch.tensor([6.0, 0.0, 0.0, 5.0, 3.0])
    # plain division; zero row, fresh; zero row, B moved; row that vanished; zero row with a magnitude of its own
    assert row_norm.row_scale(m, squared, base).tolist() == [2.0, 1.0, 1.0, 5.0, 3.0]
    assert row_norm.row_scale(m[2:3], squared[2:3], base[:1]).tolist() == [0.0]  # m = 0 on a row that is not 0


@pytest.mark.parametrize("norm_gradient", ["detached", "exact"])
@pytest.mark.parametrize("B_moved", [False, True])
def test_zero_rows_have_finite_gradients(norm_gradient, B_moved):
    W, A, B = tensors(6, 8, 3)
    W[2], W[4] = 0, 0
    B = torch.randn(6, 3) if B_moved else torch.zeros(6, 3)
    m = W.norm(dim=1).requires_grad_()
    A.requires_grad_(), B.requires_grad_()
    base = row_norm.base_squared_norm(tiles_of(W))
    with torch.set_grad_enabled(norm_gradient == "exact"):
        squared = row_norm.squared_row_norm(base, tiles_of(W), A, B, 1.5)
    g = row_norm.row_scale(m, squared, base)
    assert g[2] == g[4] == 1
    dA, dB, dm = torch.autograd.grad(g.sum(), (A, B, m), allow_unused=True)
    for gradient in (dA, dB, dm):
        assert gradient is None or torch.isfinite(gradient).all()
    assert dm[2] == dm[4] == 0
    assert (dm != 0).sum() == 4
