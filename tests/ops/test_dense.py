"""DoRA over a dense weight in one node: the same numbers as the nodes it stands for, and what it keeps."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from doratune.ops import compose, reference
from doratune.ops.compose import scale_rows
from doratune.ops.dense import scaled_dense
from doratune.ops.low_rank import dense_low_rank
from helpers import error

SCALE = 0.6


def tensors(shape=(5, 7), out=6, dtype=torch.float32):
    """x, W, A, B, m, ``m / n`` and a bias."""
    generator = torch.Generator().manual_seed(0)

    def new(*size):
        return torch.randn(size, generator=generator)

    x, W, A, B, m, b = new(*shape), new(out, shape[-1]), new(3, shape[-1]), new(out, 3), new(out).abs() + 1, new(out)
    g = reference.dora_scale(W.double(), A.double(), B.double(), m.double(), SCALE).float()
    return x.to(dtype), W.to(dtype), A, B, m, g, b.to(dtype)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7), (0, 7)], ids=str)
@pytest.mark.parametrize("biases", ["none", "same", "own"])
def test_the_output_and_its_gradients_are_the_references(biases, shape, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(compose, "KERNELS", ())
    x, W, A, B, m, g, b = tensors(shape)
    leaves = [t.requires_grad_() for t in (x, A, B, m)]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    expected = reference.dora_linear(doubles[0], W.double(), None, *doubles[1:], SCALE)
    inner = outer = None
    if biases != "none":
        inner, outer = b, b if biases == "same" else (2 * b).requires_grad_()
        if biases == "own":
            leaves.append(outer)
            doubles.append(outer.detach().double().requires_grad_())
        expected = expected + (doubles[4] if biases == "own" else b.double())
    y = scaled_dense(x, W, inner, outer, m, g, A, B, SCALE)
    assert y.shape == expected.shape
    assert error(y, expected) < 1e-5
    dy = torch.randn(y.shape)
    found = torch.autograd.grad(y, leaves, dy)
    for f, e in zip(found, torch.autograd.grad(expected, doubles, dy.double()), strict=True):
        assert error(f, e) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dropping", [False, True])
def test_it_is_what_the_separate_nodes_compute(dropping, dtype):
    x, W, A, B, m, g, b = tensors((16, 7), dtype=dtype)
    leaves = [t.requires_grad_() for t in (x, A, B, m)]
    dropped = torch.rand(16, 7, generator=torch.Generator().manual_seed(1)) < 0.5 if dropping else None
    n, dy = m.detach() / g, torch.randn(16, 6).to(dtype)
    separate = scale_rows(dense_low_rank(x, W, b, A, B, SCALE, dropped), m / n, b, b, keep="output")
    together = scaled_dense(x, W, b, b, m, g, A, B, SCALE, dropped)
    assert torch.equal(together, separate)
    found, expected = (torch.autograd.grad(y, leaves, dy) for y in (together, separate))
    for f, e in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(f, e)
    assert error(found[3], expected[3]) < 1e-6


@pytest.mark.parametrize("leaf", range(4), ids=["x", "A", "B", "m"])
def test_a_single_gradient_is_found_too(leaf):
    x, W, A, B, m, g, b = tensors()
    doubles = [t.double() for t in (x, A, B, m)]
    leaves = [x, A, B, m]
    leaves[leaf].requires_grad_()
    doubles[leaf].requires_grad_()
    y = scaled_dense(x, W, b, b, m, g, A, B, SCALE)
    expected = reference.dora_linear(doubles[0], W.double(), b.double(), *doubles[1:], SCALE)
    (found,) = torch.autograd.grad(y.square().sum(), leaves[leaf])
    (right,) = torch.autograd.grad(expected.square().sum(), doubles[leaf])
    assert error(found, right) < 1e-5


def test_rows_trained_as_lora_and_magnitudes_that_became_zero_have_no_gradient():
    x, W, A, B, m, _, _ = tensors()
    W[0], m[0] = 0, 0  # as a zero row starts: g is 1
    m[1] = 0
    g = reference.dora_scale(W, A, B, m, SCALE)
    assert g[:2].tolist() == [1, 0]
    y = scaled_dense(x, W, None, None, m.requires_grad_(), g, A, B, SCALE)
    y.sum().backward()
    assert m.grad[:2].tolist() == [0, 0]
    assert m.grad[2:].all()


@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("afterwards", ["none", "add_", "relu_", "zero_", "of an alias"])
def test_an_output_that_was_overwritten_is_computed_again(afterwards, hooks):
    x, W, A, B, m, g, b = tensors((9, 7))
    leaves = [t.requires_grad_() for t in (x, A, B, m)]
    dy = torch.randn(9, 6)
    separate = scale_rows(dense_low_rank(x, W, b, A, B, SCALE), m * (g / m).detach(), b, b)
    factor = (separate > 0).float() if afterwards == "relu_" else torch.full((9, 6), float(afterwards != "zero_"))
    expected = torch.autograd.grad(separate, leaves, dy * (1 if afterwards == "of an alias" else factor))
    context = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t) if hooks else torch.enable_grad()
    with context:
        y = scaled_dense(x, W, b, b, m, g, A, B, SCALE)
        if afterwards == "add_":
            y.add_(1)
        elif afterwards == "of an alias":
            y.detach().add_(1)
        elif afterwards != "none":
            getattr(y, afterwards)()
    for found, right in zip(torch.autograd.grad(y, leaves, dy), expected, strict=True):
        assert error(found, right) < 1e-5


def test_a_gradient_written_over_the_output_is_noticed():
    class OverWhatWasSaved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            ctx.save_for_backward(y)
            return y.square()

        @staticmethod
        def backward(ctx, dz):
            (y,) = ctx.saved_tensors
            y.detach().numpy()[:] = (2 * y * dz).numpy()
            return y

    found = []
    for square in (OverWhatWasSaved.apply, torch.square):
        x, W, A, B, m, g, b = tensors((9, 7))
        square(scaled_dense(x, W, b, b, m.requires_grad_(), g, A, B, SCALE)).sum().backward()
        found.append(m.grad)
    assert error(found[0], found[1]) < 1e-5


@pytest.mark.parametrize("what", ["x", "m"])
def test_what_cannot_be_computed_again_must_stay_as_it_was(what):
    x, W, A, B, m, g, b = tensors()
    y = scaled_dense(x, W, b, b, m.requires_grad_(), g, A.requires_grad_(), B, SCALE)
    with torch.no_grad():
        {"x": x, "m": m}[what].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("in_place", [False, True])
def test_checkpointing_frees_the_output_and_finds_the_same_gradients(in_place):
    x, W, A, B, m, g, b = tensors((64, 7), out=128)
    leaves = [t.requires_grad_() for t in (x, A, B, m)]

    def run(x):
        y = scaled_dense(x, W, b, b, m, g, A, B, SCALE)
        return y.mul_(2) if in_place else F.silu(y)

    expected = torch.autograd.grad(run(x).sum(), leaves)
    before = {id(t) for t in gc.get_objects() if issubclass(type(t), torch.Tensor)}
    y = checkpoint(run, x, use_reentrant=False)
    kept = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and id(t) not in before and t is not y]
    assert max((t.untyped_storage().nbytes() for t in kept), default=0) < y.nbytes
    for found, right in zip(torch.autograd.grad(y.sum(), leaves), expected, strict=True):
        assert error(found, right) < 1e-5
