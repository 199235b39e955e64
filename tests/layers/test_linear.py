"""What is particular to linear layers."""

import itertools
import re
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import doratune as dt
from doratune.layers.linear import FEW_TOKENS
from helpers import error, move, one_layer
from helpers_cases import Host, OwnForward, copy_hook, found_gradients, linear_case, setup, upstream


def host(base, **options):
    model = Host(base)
    return dt.attach(model, dt.AdapterConfig(**{"rank": 4, "targets": ["layer"]} | options))


# Which path runs


def test_dense_layers_take_the_fused_path():
    assert dt.explain(host(nn.Linear(6, 8)))["layer"] == ("dense, fused input gradient", "")


@pytest.mark.parametrize("has", [True, False])
def test_a_dtype_that_the_processor_does_not_multiply_is_named(has, monkeypatch):
    model = host(nn.Linear(6, 8, dtype=torch.bfloat16))
    monkeypatch.setattr("doratune.layers.linear.multiplies", lambda *_: has)
    reason = "" if has else "this processor has no bfloat16 products, float32 is many times faster"
    assert dt.explain(model)["layer"] == ("dense, fused input gradient", reason)


@pytest.mark.parametrize("loaded", [True, False])
def test_outputs_that_liger_may_overwrite_are_not_kept(loaded, monkeypatch):
    """Its RoPE rotates q and k where they lie, by raw pointers: nothing could tell afterwards."""
    if loaded:
        monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    model = move(host(nn.Linear(6, 8)))
    layer = one_layer(model)
    layer.decide("default")
    assert layer.adapters["default"].keep_output
    assert ("liger_kernel" in dt.explain(model)["layer"][1]) == loaded
    x, dy = torch.randn(5, 6), torch.randn(5, 8)
    gradients = []
    for overwritten in (False, True):
        y = model(x)
        if overwritten:
            y.detach().numpy()[:] *= -1
        gradients.append(torch.autograd.grad(y, layer.magnitude["default"], dy)[0])
    assert torch.equal(*gradients) == loaded


def _replace_forward(base):
    base.forward = lambda x, forward=base.forward: forward(x)


SLOW = {
    "forward of its own": (lambda: OwnForward(6, 8), lambda base: None),
    "replaced on the instance": (lambda: nn.Linear(6, 8), _replace_forward),
    "hooks": (lambda: nn.Linear(6, 8), lambda base: base.register_forward_hook(lambda m, i, o: None)),
    "pre-hooks": (lambda: nn.Linear(6, 8), lambda base: base.register_forward_pre_hook(lambda m, i: None)),
    "parametrised": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), lambda base: None),
    "being trained": (lambda: nn.Linear(6, 8), lambda base: base.weight.requires_grad_(True)),
    "a trained bias": (lambda: nn.Linear(6, 8), lambda base: base.bias.requires_grad_(True)),
}


@pytest.mark.parametrize("why", SLOW)
def test_whatever_is_special_takes_the_bases_own_forward(why):
    make, prepare = SLOW[why]
    model = host(make())
    prepare(one_layer(model).base_layer)
    path, reason = dt.explain(model)["layer"]
    assert path == "over the base's output"
    assert reason
    # and gives the same numbers as the fused path
    move(model)
    layer = one_layer(model)
    plain = nn.Linear(6, 8)
    with torch.no_grad():
        plain.weight.copy_(layer.base_layer.weight)
        plain.bias.copy_(layer.base_layer.bias)
    fused = host(plain)
    for group in ("lora_A", "lora_B", "magnitude"):
        getattr(one_layer(fused), group)["default"].data.copy_(getattr(layer, group)["default"])
    x, x2 = torch.randn(5, 6, requires_grad=True), None
    x2 = x.detach().clone().requires_grad_()
    y, y2 = model(x), fused(x2)
    assert error(y, y2) < 1e-5
    dy = torch.randn(5, 8)
    y.backward(dy)
    y2.backward(dy)
    assert error(x.grad, x2.grad) < 1e-5
    for group in ("lora_A", "lora_B", "magnitude"):
        found, expected = (getattr(one_layer(m), group)["default"].grad for m in (model, fused))
        assert error(found, expected) < 1e-5, group


# Bases that do more than multiply


class Router(nn.Linear):
    """As Llama 4's."""

    def forward(self, x):
        logits = super().forward(x)
        return logits.sigmoid(), logits


class Activated(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


class Wider(nn.Linear):
    """As IDEFICS's, whose output has columns of another table."""

    def forward(self, x):
        y = super().forward(x)
        return torch.cat([y, y[..., :1]], -1)


class Grouped(nn.Linear):
    """As DeepSeek-V4's: in_features of each group."""

    def forward(self, x):
        return x.view(-1, 4, self.in_features)


@pytest.mark.parametrize(
    ("make", "device", "reason"),
    [
        (Router, "cpu", "gives a tuple"),
        (Router, "meta", "gives a tuple"),
        (Wider, "cpu", r"gives a tensor \(3, 9\)"),
        (Grouped, "cpu", "takes no rows"),
        (Activated, "cpu", "not linear"),
    ],
)
def test_a_subclass_that_is_no_linear_layer_is_named(make, device, reason):
    model = nn.ModuleDict({"gate": make(6, 8), "up": nn.Linear(6, 8)}).to(device)
    dt.attach(model, dt.AdapterConfig(rank=2))
    summary = dt.summary(model)
    assert [layer.path for layer in summary.layers] == ["up"]
    assert re.search(reason, summary.left_alone["gate"])
    with pytest.raises(dt.AdapterError, match=f"gate: {make.__name__} has a forward of its own, .*{reason}"):
        dt.attach(model, dt.AdapterConfig(rank=2, targets=["gate"]), "second")


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_inputs_that_do_not_lie_in_one_piece_give_the_base_bit_for_bit(bias):
    base = nn.Linear(16, 4).requires_grad_(False)
    x = torch.randn(5, 3, 16).transpose(0, 1)
    expected = base(x)
    model = dt.attach(nn.Sequential(base), dt.AdapterConfig(rank=2, bias=bias))
    for training in (True, False):
        assert torch.equal(model.train(training)(x), expected)
        with torch.no_grad():
            assert torch.equal(model(x), expected)


def test_a_hook_that_changes_the_output_keeps_working():
    base = nn.Linear(6, 8)
    base.register_forward_hook(lambda m, i, o: o + 10)
    x = torch.randn(5, 6)
    before = base(x)
    model = host(base)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_evaluation_of_many_tokens(method, autocast, bias):
    """As in training, and the base's own output, which its hooks may keep, is not written over."""
    model = move(host(nn.Linear(6, 8), method=method, bias=bias))
    kept = []
    one_layer(model).base_layer.register_forward_hook(lambda _, args, y: kept.append((y, y.clone())))
    x = torch.randn(3, FEW_TOKENS, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        trained, evaluated = model.train()(x), model.eval()(x)
    assert evaluated.dtype == trained.dtype
    assert error(evaluated, trained) < (2e-2 if autocast else 1e-6)
    assert all(torch.equal(y, before) for y, before in kept)


@pytest.mark.parametrize("afterwards", ["nothing", "in place"])
def test_a_base_whose_hook_scales_its_output_has_the_magnitudes_true_gradient(afterwards):
    """A recomputation after an in-place operation has to go through the base, hooks included."""
    base = nn.Linear(6, 8, bias=False)
    base.register_forward_hook(lambda m, i, o: o * 3)
    model = host(base)
    move(model)
    layer = one_layer(model)
    x = torch.randn(5, 6)
    dy = torch.randn(5, 8)
    y = model(x)
    if afterwards == "in place":
        y.add_(1)
    (dm,) = torch.autograd.grad(y, layer.magnitude["default"], dy)
    with torch.no_grad():
        z = base(x) + layer.adapters["default"].scale * x @ layer.lora_A["default"].T @ layer.lora_B["default"].T
        n = layer.squared_norm("default").sqrt()
    assert error(dm, (dy * z).sum(0) / n) < 1e-5


class Overwriting(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y = self.layer(x)
        y[..., 0] = 0
        return y.mul_(3).add_(1)


@pytest.mark.parametrize("norm_gradient", ["detached", "exact"])
@pytest.mark.parametrize("layer", [lambda: nn.Linear(6, 8), lambda: nn.Conv1d(6, 8, 3)], ids=["linear", "conv"])
def test_compiled_code_that_overwrites_an_output_has_the_true_gradients(layer, norm_gradient):
    model = Overwriting(layer())
    dt.attach(model, dt.AdapterConfig(rank=2, targets=["layer"], norm_gradient=norm_gradient))
    move(model)
    x, found = torch.randn(5, 6, 6), []
    torch._dynamo.reset()
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        run(x).sin().sum().backward()
        found.append({name: p.grad.clone() for name, p in dt.trainable_parameters(model).items()})
    torch._dynamo.reset()
    for name, gradient in found[0].items():
        assert error(found[1][name], gradient) < 1e-5, name


class OverwritingInput(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, add=torch.Tensor.add_):
        h = x.tanh()
        y = self.layer(h)
        return y.sum() + add(h, 1).sin().sum()


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_compiled_code_that_overwrites_an_input_has_the_true_gradients(method, hooked):
    """In eager mode torch refuses it."""
    model = OverwritingInput(nn.Linear(6, 8))
    if hooked:
        model.layer.register_forward_hook(copy_hook)
    move(dt.attach(model, dt.AdapterConfig(rank=2, targets=["layer"], method=method)))
    x, found = torch.randn(5, 6), []
    torch._dynamo.reset()
    for run in (lambda x: model(x, torch.add), torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        run(x).backward()
        found.append({name: p.grad.clone() for name, p in dt.trainable_parameters(model).items()})
    torch._dynamo.reset()
    for name, gradient in found[0].items():
        assert error(found[1][name], gradient) < 1e-5, name


def test_the_bases_hooks_never_see_the_adapters_own_arithmetic():
    seen = []
    base = nn.Linear(6, 8)
    base.register_forward_hook(lambda m, i, o: seen.append(tuple(i[0].shape)))
    model = host(base)
    model(torch.randn(5, 6)).sum().backward()
    assert seen == [(5, 6)]


def test_a_trained_base_gets_its_gradient_and_a_fresh_norm():
    model = host(nn.Linear(6, 8))
    move(model)
    layer = one_layer(model)
    W = layer.base_layer.weight.requires_grad_(True)
    x, dy = torch.randn(5, 6), torch.randn(5, 8)
    g = layer.row_scale("default").detach()
    (dW,) = torch.autograd.grad(model(x), W, dy)
    assert error(dW, g[:, None] * (dy.T @ x)) < 1e-5
    optimizer = torch.optim.SGD([W], lr=0.5)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        V = W.double() + layer.adapters["default"].scale * (
            layer.lora_B["default"].double() @ layer.lora_A["default"].double()
        )
        m = layer.magnitude["default"]
        for mode in (True, False):
            model.train(mode)
            with torch.no_grad():
                expected = x.double() @ ((m.double() / V.norm(dim=1))[:, None] * V).T + layer.bias.double()
                assert error(model(x), expected) < 1e-5


# Corners of the numbers


def test_a_row_of_nan_harms_no_gradient_of_others():
    base = nn.Linear(6, 8)
    with torch.no_grad():
        base.weight[7] = torch.nan  # as rows that pad a vocabulary
    layer = one_layer(host(base))
    layer(torch.randn(4, 6))[:, :7].sum().backward()
    assert layer.lora_A["default"].grad.isfinite().all()
    assert layer.lora_B["default"].grad.isfinite().all()
    assert layer.row_scale("default")[7] == 1


def test_zero_rows_train_without_nan_as_lora_rows():
    for norm_gradient in ("detached", "exact"):
        base = nn.Linear(6, 8)
        with torch.no_grad():
            base.weight[[1, 4]] = 0
        model = host(base, norm_gradient=norm_gradient)
        layer = one_layer(model)
        assert torch.equal(layer.row_scale("default"), torch.ones(8))
        x, target = torch.randn(16, 6), torch.randn(16, 8)
        optimizer = torch.optim.AdamW(dt.parameter_groups(model, lr=0.05, weight_decay=0.1))
        losses = []
        for _ in range(20):
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            assert all(torch.isfinite(p.grad).all() for p in dt.trainable_parameters(model).values())
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        g = layer.row_scale("default").detach()
        assert g[1] == g[4] == 1
        assert layer.lora_B["default"][[1, 4]].abs().min() > 0  # they do train
        change = layer.adapters["default"].scale * layer.lora_B["default"] @ layer.lora_A["default"]
        expected = x @ change[1] + base.bias[1]
        assert error(model(x)[:, 1], expected) < 1e-5


ZERO_ROW = linear_case("linear-zero-row", lambda: _with_zero_row(nn.Linear(12, 20)))


def _with_zero_row(base):
    with torch.no_grad():
        base.weight[5] = 0
    return base


@pytest.mark.parametrize("method", ["dora", "dora-exact", "magnitude"])
@pytest.mark.parametrize("in_place", [False, True])
def test_gradients_with_a_zero_row(method, in_place):
    s = setup(ZERO_ROW, method)
    layer = s.layer
    assert layer.magnitude["default"][5] == 0
    dy = upstream(s.run())
    expected = s.reference().gradients(dy)
    found = found_gradients(s, dy, (lambda x: s.model(x).add_(1)) if in_place else None)
    for part, gradient in expected.items():
        assert error(found[part], gradient) < 1e-5, part


@pytest.mark.parametrize("method", ["dora", "dora-exact", "magnitude"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("dtype", "bias"), [(torch.float32, 1.0), (torch.float32, 100.0), (torch.bfloat16, 1.0)], ids=str
)
def test_magnitudes_of_zero_and_large_biases(dtype, bias, in_place, method):
    """Where the output says nothing about z, something else is kept: decided when an adapter starts or is loaded."""

    def make():
        base = nn.Linear(12, 20)
        nn.init.normal_(base.bias, std=bias)
        return base

    s = setup(linear_case("biased", make), method)
    with torch.no_grad():
        s.layer.magnitude["default"][3] = 0
        s.layer.magnitude["default"][4] *= 1e-3
    s.layer.decide("default")
    s.model.to(dtype)
    s.x = s.x.to(dtype)
    dy = upstream(s.run())
    expected = s.reference().gradients(dy)
    found = found_gradients(s, dy, (lambda x: s.model(x).add_(1)) if in_place else None)
    for part, gradient in expected.items():
        assert error(found[part], gradient) < (1e-5 if dtype == torch.float32 else 3e-2), part
    assert found["m"][3] != 0


@pytest.mark.parametrize("norm_gradient", ["detached", "exact"])
def test_near_cancellation_switches_to_the_dense_norm(norm_gradient):
    base = nn.Linear(6, 8)
    model = host(base, rank=6, alpha=6, norm_gradient=norm_gradient)
    layer = one_layer(model)
    A, B, m = (getattr(layer, n)["default"] for n in ("lora_A", "lora_B", "magnitude"))
    with torch.no_grad():
        torch.nn.init.orthogonal_(A)
        B.copy_(-(base.weight.double() @ A.double().inverse()).float() * (1 - 1e-3))
    assert not layer.adapters["default"].dense_norm
    layer.decide("default")
    assert layer.adapters["default"].dense_norm
    V = base.weight.double() + B.double() @ A.double()
    assert error(layer.row_scale("default"), m.double() / V.norm(dim=1)) < 1e-4
    x = torch.randn(5, 6)
    assert error(model(x), x.double() @ ((m.double() / V.norm(dim=1))[:, None] * V).T + base.bias) < 1e-3
    if norm_gradient == "exact":
        (dA,) = torch.autograd.grad(layer.row_scale("default").sum(), A)
        A2 = A.detach().double().requires_grad_()
        n = (base.weight.double() + B.detach().double() @ A2).norm(dim=1)
        (expected,) = torch.autograd.grad((m.detach().double() / n).sum(), A2)
        assert error(dA, expected) < 1e-2


def test_a_wide_layer_with_a_high_rank():
    model = host(nn.Linear(300, 40), rank=64, alpha=64)
    move(model, 0.05)
    layer = one_layer(model)
    x = torch.randn(33, 300)
    V = layer.base_layer.weight.double() + layer.lora_B["default"].double() @ layer.lora_A["default"].double()
    W = (layer.magnitude["default"].double() / V.norm(dim=1))[:, None] * V
    assert error(model(x), x.double() @ W.T + layer.bias.double()) < 1e-5


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "magnitude"])
@pytest.mark.parametrize("change", ["prune", "parametrise"])
def test_a_parameter_that_is_none_any_more_is_not_left_out(part, change):
    model = move(host(nn.Linear(6, 8)))
    group = getattr(one_layer(model), part)
    if change == "prune":
        prune.random_unstructured(group, "default", amount=0.5)
    else:
        nn.utils.parametrize.register_parametrization(group, "default", nn.Identity())
    for training in (True, False):
        with pytest.raises(dt.AdapterError, match=r"layer: .* not a parameter any more"):
            model.train(training)(torch.randn(2, 6))


# A layer's face


def test_the_wrapped_layer_shows_its_bases_attributes():
    base = nn.Linear(6, 8)
    base.marker = "mine"
    model = host(base)
    layer = one_layer(model)
    with dt.disabled(model):
        assert layer.weight is base.weight
    assert (layer.weight.shape, layer.weight.dtype) == (base.weight.shape, base.weight.dtype)
    assert layer.bias is base.bias
    assert (layer.in_features, layer.out_features, layer.marker) == (6, 8, "mine")
    assert layer.base_layer is base
    assert not hasattr(layer, "nothing_of_this_name")
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = layer.nothing_of_this_name


def test_parameters_have_the_documented_names():
    model = host(nn.Linear(6, 8), bias="lora_only")
    assert set(dt.trainable_parameters(model)) == {
        f"layer.{part}.default" for part in ("lora_A", "lora_B", "magnitude", "adapter_bias")
    }
    assert {p.dtype for p in dt.trainable_parameters(model).values()} == {torch.float32}
    assert "default: dora rank 4; active: default" in repr(model)


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal"])
def test_starts_are_drawn_and_change_nothing(init):
    torch.manual_seed(0)
    base = nn.Linear(64, 48)
    x = torch.randn(5, 64)
    before = base(x)
    model = host(base, rank=16, init=init)
    assert torch.equal(model(x), before)
    layer = one_layer(model)
    A, B = layer.lora_A["default"].detach(), layer.lora_B["default"]
    assert not B.any()
    if init == "orthogonal":
        assert torch.allclose(A @ A.T, torch.eye(16), atol=1e-5)
    else:
        expected = 1 / 16 if init == "gaussian" else 64**-0.5 / 3**0.5
        assert A.std().item() == pytest.approx(expected, rel=0.1)


def test_float64_models_are_not_rounded_to_float32():
    base = nn.Linear(6, 8).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    before = base(x)
    model = host(base)
    assert error(model(x), before) < 1e-6
    assert model(x).dtype == torch.float64


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.int64, False), (torch.int64, True), (torch.bfloat16, False)], ids=str
)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_input_that_the_base_does_not_take_is_an_error_here_too(method, dtype, autocast):
    model = nn.Sequential(nn.Linear(4, 3))
    dt.attach(model, dt.AdapterConfig(method=method, rank=2))
    x = torch.ones(2, 4, dtype=dtype)
    for training, gradients in itertools.product((True, False), repeat=2):
        model.train(training)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            torch.set_grad_enabled(gradients),
            pytest.raises(RuntimeError, match="dtype"),
        ):
            model(x)


def test_more_than_one_input_is_refused_while_an_adapter_is_active():
    model = host(nn.Linear(6, 8))
    with pytest.raises(TypeError, match="takes one input"):
        one_layer(model)(torch.randn(5, 6), torch.randn(5, 6))


def test_the_input_may_be_given_by_name():
    model = move(host(nn.Linear(6, 8)))
    x = torch.randn(5, 6)
    assert torch.equal(one_layer(model)(input=x), model(x))
    with pytest.raises(TypeError, match="takes one input"):
        one_layer(model)()


def test_a_weight_that_a_hook_makes_is_the_one_of_the_next_forward():
    base = prune.identity(nn.Linear(6, 8), "weight")  # and weight_norm in the same way
    with torch.no_grad():
        base.weight_orig *= torch.arange(1, 9)[:, None]  # as by loading a state dict
    x = torch.randn(5, 6)
    assert torch.equal(host(base)(x), base(x))
