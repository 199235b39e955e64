"""The output of an adapted layer from the output of its base, and what its backward pass keeps."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from doratune.ops import compose, low_rank, reference
from doratune.ops.compose import OutputGuard, scale_rows
from doratune.ops.low_rank import adapted_weight, dense_low_rank, low_rank_update
from helpers import error


@pytest.fixture(params=["kernels", "plain arithmetic"])
def way(request, monkeypatch):
    """As on a CPU or a GPU, and as on other devices."""
    if request.param == "plain arithmetic":
        monkeypatch.setattr(compose, "KERNELS", ())


SHAPES = [(7,), (1, 7), (5, 7), (2, 3, 7), (2, 1, 2, 7), (0, 7), (2, 0, 7)]


def tensors(shape=(5, 7), out=6, rank=3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def new(*size):
        return torch.randn(size, generator=generator)

    x = new(*shape).to(dtype)
    return x, new(out, shape[-1]).to(dtype), new(rank, shape[-1]), new(out, rank), new(out) + 2, new(out)


def by_update(x, W, A, B, scale):
    return low_rank_update(F.linear(x, W), x, A, B, scale)


def by_dense(x, W, A, B, scale):
    return dense_low_rank(x, W, None, A, B, scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", [by_dense, by_update])
def test_low_rank_change_and_its_gradients(function, shape):
    x, W, A, B, _, _ = tensors(shape)
    leaves = [t.requires_grad_() for t in (x, A, B)]
    doubles = [t.detach().double().requires_grad_() for t in (x, A, B)]
    y = function(x, W, A, B, 0.6)
    expected = F.linear(doubles[0], reference.lora_weight(W.double(), *doubles[1:], 0.6))
    assert y.shape == expected.shape == (*shape[:-1], 6)
    assert error(y, expected) < 1e-5
    dy = torch.randn(y.shape)
    for f, e in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, doubles, dy.double()), strict=True
    ):
        assert f.dtype == torch.float32
        assert error(f, e) < 1e-5


@pytest.mark.parametrize("function", [by_dense, by_update])
def test_gradients_of_masters_are_not_rounded_where_products_keep_their_sums(function, monkeypatch):
    """As on NVIDIA's GPUs; here the product of the same numbers stands in for theirs."""
    x, W, A, B, _, _ = tensors((64, 7), dtype=torch.bfloat16)
    leaves = [A.requires_grad_(), B.requires_grad_()]
    dy = torch.randn(64, 6).bfloat16()

    def gradients():
        return torch.autograd.grad(function(x, W, A, B, 0.5), leaves, dy)

    rounded = gradients()
    monkeypatch.setattr(low_rank, "sums_stay_wide", lambda device: True)
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype))
    for wide, narrow in zip(gradients(), rounded, strict=True):
        assert wide.dtype == narrow.dtype == torch.float32
        assert 0 < error(wide, narrow) < 1e-2
        assert torch.equal(narrow.bfloat16().float(), narrow)
        assert not torch.equal(wide.bfloat16().float(), wide)


@pytest.mark.parametrize("function", [by_dense, by_update])
def test_products_of_other_dtypes_stay_as_they_are_there(function, monkeypatch):
    """On NVIDIA's GPUs, too, torch gives float32 sums of 16-bit numbers only."""
    x, W, A, B, _, _ = tensors((64, 7), dtype=torch.float64)
    leaves = [A.requires_grad_(), B.requires_grad_()]
    monkeypatch.setattr(low_rank, "sums_stay_wide", lambda device: True)
    monkeypatch.setattr(torch, "mm", lambda *_, **__: pytest.fail("float64 with out_dtype"))
    for gradient in torch.autograd.grad(function(x, W, A, B, 0.5).sum(), leaves):
        assert gradient.dtype == torch.float32


@given(
    batch=st.lists(st.integers(0, 4), max_size=3),
    columns=st.integers(1, 9),
    out=st.integers(1, 9),
    rank=st.integers(1, 5),
    scale=st.sampled_from([0.25, 1.0, 16.0]),
    has_bias=st.booleans(),
    keep=st.sampled_from(["input", "output"]),
    seed=st.integers(0, 1000),
)
def test_any_shape(batch, columns, out, rank, scale, has_bias, keep, seed):
    x, W, A, B, g, b = tensors((*batch, columns), out, rank, seed=seed)
    b = b if has_bias else None
    g = torch.where(g.abs() < 0.2, 0.7, g)
    leaves = [t.requires_grad_() for t in (x, A, B, g)]
    y = scale_rows(dense_low_rank(x, W, None, A, B, scale), g, None, b, keep=keep)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    x2, A2, B2, g2 = doubles
    expected = F.linear(x2, g2[:, None] * reference.lora_weight(W.double(), A2, B2, scale))
    expected = expected if b is None else expected + b.double()
    assert y.shape == expected.shape
    assert error(y, expected) < 1e-5
    dy = torch.randn(y.shape)
    found = torch.autograd.grad(y, leaves, dy)
    for f, e in zip(found, torch.autograd.grad(expected, doubles, dy.double()), strict=True):
        assert error(f, e) < 1e-4  # few rows: sums may cancel


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("keep", ["input", "output"])
@pytest.mark.parametrize("biases", ["none", "outer", "both", "swapped"])
def test_scale_and_its_gradients(biases, keep, shape):
    u, _, _, _, g, b = tensors(shape, out=7)
    inner, outer = {"none": (None, None), "outer": (None, b), "both": (b, b), "swapped": (2 * b, b)}[biases]
    distinct = {id(t): t for t in (u, g, inner, outer) if t is not None}
    leaves = [t.requires_grad_() for t in distinct.values() if t.is_leaf]
    if biases == "swapped":
        inner = inner.detach().requires_grad_()
        leaves = [u, g, inner, outer]
    doubles = {id(t): t.detach().double().requires_grad_() for t in leaves}
    y = scale_rows(u, g, inner, outer, keep=keep)
    u2, g2 = doubles[id(u)], doubles[id(g)]
    i2, o2 = (0 if t is None else doubles[id(t)] for t in (inner, outer))
    expected = g2 * (u2 - i2) + o2
    assert error(y, expected) < 1e-5
    dy = torch.randn(y.shape)
    found = torch.autograd.grad(y, leaves, dy)
    for f, e in zip(found, torch.autograd.grad(expected, list(doubles.values()), dy.double()), strict=True):
        assert error(f, e) < 1e-5


@pytest.mark.usefixtures("way")
def test_features_in_another_dimension():
    u, g, b = torch.randn(2, 3, 4, 5, requires_grad=True), torch.rand(3) + 0.5, torch.randn(3)
    g.requires_grad_()
    for keep in ("input", "output"):
        y = scale_rows(u, g, b, b, dim=1, keep=keep)
        g2, u2 = g.detach().double().requires_grad_(), u.detach().double().requires_grad_()
        shape = (1, 3, 1, 1)
        expected = g2.view(shape) * (u2 - b.view(shape)) + b.view(shape)
        assert error(y, expected) < 1e-6
        dy = torch.randn(y.shape)
        found = torch.autograd.grad(y, (u, g), dy)
        for f, e in zip(found, torch.autograd.grad(expected, (u2, g2), dy.double()), strict=True):
            assert error(f, e) < 1e-5


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_scale_keeps_its_precision(dtype):
    """In the output's dtype a g near 1 would be rounded to 8 bits, and so would sums for its gradient."""
    u = torch.randn(4096, 6).to(dtype)
    g = (1 + torch.arange(6) * 1e-3).requires_grad_()
    y = scale_rows(u, g)
    assert y.dtype == dtype
    exact = u.double() * g.detach().double()
    # The nearest number there is, but where float32's own rounding meets the middle between two.
    assert (y == exact.to(dtype)).float().mean() > 0.999
    assert ((y.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs()).all()
    dy = torch.randn(4096, 6).to(dtype)
    (dg,) = torch.autograd.grad(y, g, dy)
    assert dg.dtype == torch.float32
    assert error(dg, (dy.double() * u.double()).sum(0)) < 1e-5


@pytest.mark.usefixtures("way")
def test_a_scale_of_one_changes_nothing():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        u, b = torch.randn(64, 6).to(dtype), torch.randn(6).to(dtype)
        assert torch.equal(scale_rows(u, torch.ones(6)), u)
        assert torch.equal(scale_rows(u, torch.ones(6), b, b), u)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", [0.0, 1e-8])
def test_scales_of_zero_have_their_gradient(size):
    u, _, _, _, g, b = tensors((9, 7), out=7)
    g = (g * size).requires_grad_()
    y = scale_rows(u, g, None, b)  # such a layer keeps u
    assert error(y, g.detach() * u + b) < 1e-6
    dy = torch.randn(9, 7)
    (dg,) = torch.autograd.grad(y, g, dy)
    assert error(dg, (dy.double() * u.double()).sum(0)) < 1e-5


def test_a_bias_of_100_costs_no_digits():
    u, _, _, _, g, _ = tensors((9, 7), out=7)
    b = torch.full((7,), 100.0)
    g.requires_grad_()
    dy = torch.randn(9, 7)
    (dg,) = torch.autograd.grad(scale_rows(u, g, None, b), g, dy)
    assert error(dg, (dy.double() * u.double()).sum(0)) < 1e-5


@pytest.mark.parametrize("afterwards", ["none", "add_", "relu_", "zero_", "copy_"])
@pytest.mark.parametrize("hooks", [False, True])
def test_the_guard_recomputes_what_was_overwritten(afterwards, hooks):
    u, _, _, _, g, b = tensors((9, 7), out=7)
    called = []

    def recompute(kept):
        called.append(True)
        return kept

    dy = torch.randn(9, 7)
    g.requires_grad_(), u.requires_grad_()
    context = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t) if hooks else torch.enable_grad()
    with context:
        y = scale_rows(u, g, None, b, guard=OutputGuard(recompute, u.detach()), keep="output")
        before = y.detach().clone()
        factor = torch.ones(9, 7)
        if afterwards == "add_":
            y.add_(1)
        elif afterwards == "relu_":
            y.relu_()
            factor = (before > 0).float()
        elif afterwards in ("zero_", "copy_"):
            y.zero_() if afterwards == "zero_" else y.copy_(torch.ones(9, 7))
            factor = torch.zeros(9, 7)
    du, dg = torch.autograd.grad(y, (u, g), dy)
    assert error(du, g.detach() * dy * factor) < 1e-6
    assert error(dg, (dy * factor * u.detach()).double().sum(0)) < 1e-5
    assert bool(called) == (afterwards != "none")


@pytest.mark.parametrize("both", [False, True])
def test_an_input_may_be_overwritten_unless_it_is_needed(both):
    u, _, _, _, g, b = tensors((9, 7), out=7)
    x = u.clone()
    y = scale_rows(u, g.requires_grad_(), None, b, guard=OutputGuard(lambda kept: kept, x), keep="output")
    x.zero_()
    if both:
        y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation and so has its input"):
            y.sum().backward()
    else:
        y.sum().backward()
        assert error(g.grad, u.double().sum(0)) < 1e-5


class _GradientsOverWhatWasSaved(torch.autograd.Function):
    """``silu(a) b`` as Liger computes it: the gradients are written over a and b, and no version tells of it."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    def backward(ctx, dy):
        a, b = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [t.detach().clone().requires_grad_() for t in (a, b)]
            found = torch.autograd.grad(F.silu(leaves[0]) * leaves[1], leaves, dy)
        for t, gradient in zip((a, b), found, strict=True):
            t.detach().numpy()[:] = gradient.numpy()
        return a, b


def test_gradients_written_over_the_output_are_noticed():
    results = []
    for silu in (_GradientsOverWhatWasSaved.apply, lambda a, b: F.silu(a) * b):
        ys, gs = [], []
        for seed in (0, 1):
            u, _, _, _, g, b = tensors((9, 7), out=7, seed=seed)
            gs.append(g.requires_grad_())
            guard = OutputGuard(lambda kept: kept, u.clone())
            ys.append(scale_rows(u.requires_grad_() * 1, g, None, b, guard=guard, keep="output", fresh=True))
        results.append(torch.autograd.grad(silu(*ys).square().sum(), gs))
    for found, expected in zip(*results, strict=True):
        assert error(found, expected) < 1e-5


def test_the_guard_recomputes_under_checkpointing_too():
    """There saved tensors may be read once only."""
    u, _, _, _, g, b = tensors((9, 7), out=7)
    g.requires_grad_(), u.requires_grad_()
    dy = torch.randn(9, 7)

    def run(u):
        y = scale_rows(u * 1, g, None, b, guard=OutputGuard(lambda kept: kept, u.detach()), keep="output", fresh=True)
        return y.add_(1)

    y = checkpoint(run, u, use_reentrant=False)
    du, dg = torch.autograd.grad(y, (u, g), dy)
    assert error(du, g.detach() * dy) < 1e-6
    assert error(dg, (dy * u.detach()).double().sum(0)) < 1e-5


# Writing over a fresh u


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("keep", ["output", "8-bit"])
@pytest.mark.parametrize("shape", [(9, 7), (2, 3, 7), (0, 7)], ids=str)
def test_a_fresh_input_is_written_over(shape, keep):
    u, _, _, _, g, b = tensors(shape, out=7)
    u, g, b = u.requires_grad_(), g.requires_grad_(), b.requires_grad_()
    dy = torch.randn(shape)
    results = []
    for fresh in (False, True):
        inside = u * 1
        y = scale_rows(inside, g, b, b, keep=keep, fresh=fresh)
        assert (y.data_ptr() == inside.data_ptr()) == (fresh or not y.numel())
        results.append((y.detach().clone(), *torch.autograd.grad(y, (u, g, b), dy)))
    for f, e in zip(*results, strict=True):
        assert torch.equal(f, e)


def test_what_is_needed_or_a_leaf_is_not_written_over():
    u, _, _, _, g, b = tensors((9, 7), out=7)
    before = u.clone()
    g.requires_grad_()
    scale_rows(u, g, None, b, keep="output", fresh=True)  # a leaf
    inside = u.requires_grad_() * 1
    scale_rows(inside, g, None, b, keep="input", fresh=True)  # kept for the backward pass
    assert torch.equal(u, before)
    assert torch.equal(inside, before)


def test_an_input_that_an_earlier_operation_needs_is_an_error_and_no_wrong_gradient():
    u, _, _, _, g, b = tensors((9, 7), out=7)
    inside = u.requires_grad_().exp()  # exp keeps its output
    y = scale_rows(inside, g.requires_grad_(), None, b, keep="output", fresh=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# Eight bits


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [-1, 1])
def test_eight_bits_are_enough_for_the_magnitudes_gradient(dim, dtype):
    torch.manual_seed(0)
    u = torch.randn(256, 48).to(dtype)
    u[3] *= 1e4  # spoils its own row only
    dy = torch.randn(256, 48).to(dtype)
    dy[3] *= 1e-4
    u.requires_grad_()
    g = (torch.rand(48) + 0.5).requires_grad_()
    kept, y = kept_by(lambda: scale_rows(u, g, dim=dim, keep="8-bit"))
    assert torch.equal(y, scale_rows(u, g, dim=dim))
    assert sorted(t.element_size() * t.numel() for t in kept)[-1] == u.numel()
    du, dg = torch.autograd.grad(y, (u, g), dy)
    assert error(du, g * dy.float()) < (1e-6 if dtype == torch.float32 else 5e-3)
    assert error(dg, (dy.double() * u.double()).sum(0)) < 0.02


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("shape", "dim"), [((256, 48), -1), ((8, 32, 48), -1), ((8, 48, 5, 6), 1)], ids=str)
def test_large_biases_take_none_of_the_eight_bits(shape, dim):
    """As those of some models' k_proj, where the base's own output holds them."""
    torch.manual_seed(0)
    z, dy = torch.randn(shape), torch.randn(shape)
    bias, g = torch.zeros(48), torch.ones(48, requires_grad=True)
    bias[5] = 300
    along = bias.view(-1, *[1] * (len(shape) - 2)) if dim == 1 else bias
    (dg,) = torch.autograd.grad(scale_rows(z + along, g, bias, bias, dim=dim, keep="8-bit"), g, dy)
    others = [i for i in range(len(shape)) if i != dim % len(shape)]
    assert error(dg, (dy.double() * z.double()).sum(others)) < 0.02


def test_eight_bits_of_small_numbers_in_float16():
    torch.manual_seed(0)
    u, dy = (torch.randn(256, 48).half() for _ in range(2))
    u = u * 1e-3
    g = torch.ones(48, requires_grad=True)
    (dg,) = torch.autograd.grad(scale_rows(u, g, keep="8-bit"), g, dy)
    assert error(dg, (dy.double() * u.double()).sum(0)) < 0.02


@pytest.mark.parametrize("value", [0.0, 1e-42])
def test_eight_bits_of_nothing(value):
    u = torch.full((4, 3), value)
    g = torch.ones(3, requires_grad=True)
    (dg,) = torch.autograd.grad(scale_rows(u, g, keep="8-bit"), g, torch.ones(4, 3))
    assert torch.isfinite(dg).all()


# What is kept for the backward pass


def kept_by(run):
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    return list(kept.values()), result


@pytest.mark.parametrize("keep", ["input", "output"])
def test_nothing_of_the_weights_size_is_kept_but_the_weight(keep):
    """bf16: x, W, the small A x, and one output; no float32 copy of anything large."""
    x, W, A, B, g, b = tensors((64, 48), out=56, rank=4, dtype=torch.bfloat16)
    for t in (x, A, B, g):
        t.requires_grad_()
    kept, _ = kept_by(lambda: scale_rows(dense_low_rank(x, W, None, A, B, 0.5), g, None, b, keep=keep))
    sizes = sorted((t.numel() * t.element_size() for t in kept), reverse=True)
    large = [t for t in kept if t.numel() > 64 * 4]
    assert all(t.dtype == torch.bfloat16 for t in large)
    assert [t.untyped_storage().data_ptr() for t in kept].count(W.untyped_storage().data_ptr()) == 1
    allowed = 2 * (64 * 48 + 56 * 48 + 64 * 56 + 64 * 4) + 4 * (4 * 48 + 56 * 4)
    assert sum(sizes) <= allowed


def test_no_gradient_reaches_a_frozen_weight():
    x, W, A, B, _, _ = tensors()
    W.requires_grad_()
    A.requires_grad_()
    y = dense_low_rank(x, W, None, A, B, 0.5)
    assert torch.autograd.grad(y.sum(), W, allow_unused=True) == (None,)


@pytest.mark.parametrize("scaled", [True, False])
def test_an_adapted_weight_and_its_gradients(scaled):
    _, W, A, B, g, _ = tensors()
    leaves = [W, A, B, g] if scaled else [W, A, B]
    doubles = [t.double().requires_grad_() for t in leaves]
    for t in leaves:
        t.requires_grad_()
    found = adapted_weight(W, A, B, g if scaled else None, 0.6)
    expected = reference.lora_weight(*doubles[:3], 0.6) * (doubles[3][:, None] if scaled else 1)
    assert error(found, expected) < 1e-6
    dW = torch.randn(W.shape)
    for f, e in zip(
        torch.autograd.grad(found, leaves, dW), torch.autograd.grad(expected, doubles, dW.double()), strict=True
    ):
        assert error(f, e) < 1e-5


def test_what_needs_no_gradient_is_not_computed():
    x, W, A, B, _, _ = tensors()
    x.requires_grad_()
    (dx,) = torch.autograd.grad(dense_low_rank(x, W, None, A, B, 0.5).sum(), x)
    assert error(dx, (W.double() + 0.5 * B.double() @ A.double()).sum(0).expand(5, 7)) < 1e-5
    x.requires_grad_(False)
    B.requires_grad_()
    (dB,) = torch.autograd.grad(dense_low_rank(x, W, None, A, B, 0.5).sum(), B)
    assert error(dB, (0.5 * x.double() @ A.double().T).sum(0).expand(6, 3)) < 1e-5


@pytest.mark.parametrize("wanted", [(True, True, False), (False, True, False), (True, False, False)])
def test_cuda_finds_the_statistics_where_it_looks(wanted):
    """Its kernel has no use for running statistics in the backward pass, and fails without saved ones."""

    class Watch(TorchDispatchMode):
        seen = None

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.native_batch_norm_backward.default:
                self.seen = args[5:7]
            return function(*args, **(kwargs or {}))

    dy, kept, g = torch.randn(5, 7), torch.randn(5, 7), torch.rand(7)
    bias = torch.randn(7)
    with Watch() as watch:
        compose.scaled_backward(dy, kept, g, bias, -1, wanted)
    mean, deviation = watch.seen
    assert torch.equal(mean, bias)
    assert torch.equal(deviation, torch.ones(7))


def test_a_copy_of_the_output_is_as_good_as_the_output():
    """Offloading to another device and back gives one."""

    def recompute(*inputs):
        raise AssertionError("computed again, though nothing was overwritten")

    u, g = torch.randn(5, 7, requires_grad=True), torch.rand(7, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        y = scale_rows(u * 1, g, guard=OutputGuard(recompute, u), keep="output", fresh=True)
    dy = torch.randn(5, 7)
    (dg,) = torch.autograd.grad(y, g, dy)
    assert error(dg, (dy * u).sum(0)) < 1e-5
