"""What every kind of layer has to do, with every method, in every dtype."""

import contextlib
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import doratune as dt
from doratune.layers.linear import Linear
from doratune.merge import merged_weight, verify_merge
from doratune.ops.dropout import dropped_elements
from helpers import assert_same, elementwise_error, error, replicas, snapshot
from helpers_cases import AUTOCAST, CASES, FLOAT32, METHODS, PRECISIONS, autocast, found_gradients, setup, upstream

every_case = pytest.mark.parametrize("case", CASES, ids=repr)
every_method = pytest.mark.parametrize("method", METHODS)
every_precision = pytest.mark.parametrize("precision", PRECISIONS, ids=repr)


# In every dtype


@every_precision
@every_method
@every_case
def test_a_fresh_adapter_changes_nothing_bit_for_bit(case, method, precision):
    s = setup(case, method, precision, moved=False)
    base = s.layer.base_layer
    for x in (s.x, s.x[:1], s.x[0], s.x[:0]):
        expected = s.run(x, base)
        assert torch.equal(s.run(x), expected)
        assert s.run(x).dtype == expected.dtype
        s.model.eval()
        with torch.no_grad():
            assert torch.equal(s.run(x), expected)
            assert torch.equal(s.run(x), expected)  # once more, with what was remembered
        s.model.train()


@every_precision
@pytest.mark.parametrize("method", [m for m in METHODS if m != "lora"])
@every_case
def test_the_scale_is_the_references(case, method, precision):
    s = setup(case, method, precision)
    with precision.context():
        g = s.layer.row_scale("default")
    assert g.dtype == torch.float32
    assert elementwise_error(g, s.reference().g) < precision.scale_tolerance * case.tolerance
    # A norm of W alone, or none, is another g by far: this test can fail.
    assert (s.reference().g - 1).abs().max() > 0.05


@every_precision
@every_method
@every_case
def test_the_output_is_the_references(case, method, precision):
    s = setup(case, method, precision)
    tolerance = precision.tolerance * case.tolerance
    expected = s.reference().y
    assert error(s.run(), expected) < tolerance
    s.model.eval()
    with torch.no_grad():
        assert error(s.run(), expected) < tolerance
        assert error(s.run(), expected) < tolerance
    with torch.inference_mode():
        assert error(s.run(), expected) < tolerance
    for x, rows in ((s.x[0], slice(0, 1)), (s.x[1:], slice(1, None))):
        y = s.run(x)
        assert error(y, expected[rows].reshape(y.shape)) < 2 * tolerance


@every_precision
@every_method
@every_case
def test_gradients_are_those_of_autograd_through_the_reference(case, method, precision):
    options = {"bias": "lora_only"} if case.bias else {}
    s = setup(case, method, precision, **options)
    dy = upstream(s.run())
    expected = s.reference().gradients(dy)
    found = found_gradients(s, dy)
    assert found.keys() == expected.keys()
    for part, gradient in found.items():
        assert gradient.dtype == (precision.dtype if part == "x" else torch.float32)
        assert error(gradient, expected[part]) < precision.tolerance * case.tolerance, part
    assert all(p.grad is None for p in s.layer.base_layer.parameters())


@pytest.mark.parametrize("keep_output", [False, True])
@every_method
@pytest.mark.parametrize("case", [case for case in CASES if case.bias], ids=repr)
def test_a_bias_of_the_base_that_is_trained_gets_its_gradient(case, method, keep_output):
    s = setup(case, method)
    s.layer.adapters["default"].keep_output = keep_output
    bias = s.layer.base_layer.bias.requires_grad_(True)
    b = bias.detach().double().requires_grad_()
    expected = case.dense(s.layer.base_layer, s.x.double(), s.reference().weight.detach(), b)
    dy = upstream(expected)
    (found,) = torch.autograd.grad(s.run(), bias, dy)
    assert error(found, torch.autograd.grad(expected, b, dy.double())[0]) < 1e-5


@every_precision
@every_method
@every_case
def test_merged_is_unmerged(case, method, precision):
    s = setup(case, method, precision, **({"bias": "lora_only"} if case.bias else {}))
    s.model.eval()
    with torch.no_grad():
        unmerged = s.run()
        expected = s.reference()
        # W' itself, rounded once
        rounding = torch.finfo(precision.dtype).eps
        assert error(merged_weight(s.layer, "default"), expected.weight) < max(rounding, 2e-6) * case.tolerance
        assert dt.merge(s.model, verify=True) is s.model
        merged = s.run()
    assert error(merged, unmerged) < precision.tolerance * case.tolerance
    assert error(merged, expected.y) < precision.tolerance * case.tolerance
    assert isinstance(case.make(), type(s.model.layer))
    assert s.model.layer.weight.dtype == precision.dtype
    assert set(s.model.state_dict()) == {"layer." + n for n in case.make().state_dict()}


@every_case
def test_torchs_default_device_may_be_another_one(case):
    s = setup(case, dropout=0.5 if case.drops else 0.0)
    with torch.device("meta"):
        s.run().sum().backward()
        for check in verify_merge(s.model):
            assert check.holds
        dt.merge(s.model)


@every_precision
@every_method
@every_case
def test_disabled_and_detached_are_the_base_bit_for_bit(case, method, precision):
    torch.manual_seed(0)
    plain = case.make().to(precision.dtype)
    s = setup(case, method, precision)
    before = {n: t.clone() for n, t in s.layer.base_layer.state_dict().items()}
    expected = s.run(model=plain)
    assert not torch.equal(s.run(), expected)
    with dt.disabled(s.model):
        assert torch.equal(s.run(), expected)
    assert not torch.equal(s.run(), expected)
    s.run().float().sum().backward()
    base = s.layer.base_layer
    assert dt.detach(s.model) is s.model
    assert s.model.layer is base
    assert torch.equal(s.run(), expected)
    assert {n: p.requires_grad for n, p in base.named_parameters()} == dict.fromkeys(
        dict(base.named_parameters()), True
    )
    assert all(torch.equal(before[n], t) for n, t in base.state_dict().items())


@every_method
@every_case
def test_adapters_stay_float32_when_the_model_is_cast(case, method):
    s = setup(case, method, FLOAT32, **({"bias": "lora_only"} if case.bias else {}))
    before = {part: p.detach().clone() for part, p in s.parameters().items()}
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.float(), lambda m: m.bfloat16()):
        cast(s.model)
        for part, p in s.parameters().items():
            assert p.dtype == torch.float32
            assert torch.equal(p, before[part])
    assert s.layer.base_layer.weight.dtype == torch.bfloat16
    if "m" in before:
        assert elementwise_error(s.layer.row_scale("default"), s.reference().g) < 4e-3
    x = s.x.bfloat16() if s.x.is_floating_point() else s.x
    assert error(s.run(x), s.reference().y) < 2e-2


# In every mode


MODES = {
    "train": (True, contextlib.nullcontext),
    "eval": (False, contextlib.nullcontext),
    "no_grad": (False, torch.no_grad),
    "train-no_grad": (True, torch.no_grad),
    "inference_mode": (False, torch.inference_mode),
    "autocast": (False, autocast),
    "no_grad-autocast": (False, lambda: _both(torch.no_grad(), autocast())),
}


@contextlib.contextmanager
def _both(first, second):
    with first, second:
        yield


@pytest.mark.parametrize("mode", MODES)
@every_method
@every_case
def test_moving_any_part_moves_the_output(case, method, mode):
    s = setup(case, method, **({"bias": "lora_only"} if case.bias else {}))
    training, context = MODES[mode]
    tolerance = (2e-2 if "autocast" in mode else 1e-5) * case.tolerance
    s.model.train(training)
    with context():
        before = s.run().clone()
    for part, p in s.parameters().items():
        with torch.no_grad():
            p.mul_(1.3)
        with context():
            after = s.run().clone()
        assert not torch.equal(before, after), part
        assert error(after, s.reference().y) < tolerance, part
        before = after


# What training does around a layer


SAVED_TENSOR_HOOKS = {
    "plain": contextlib.nullcontext,
    "identity-hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    "copying-hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
    "save_on_cpu": lambda: torch.autograd.graph.save_on_cpu(),
}
AFTERWARDS = {
    "relu_": lambda y: y.relu_(),
    "add_": lambda y: y.add_(1),
    "ReLU(inplace)": torch.nn.ReLU(inplace=True),
    "twice": lambda y: y.add_(1).relu_(),
}
WITHOUT_INPLACE = {
    "relu_": torch.relu,
    "add_": lambda y: y + 1,
    "ReLU(inplace)": torch.relu,
    "twice": lambda y: torch.relu(y + 1),
}


@pytest.mark.parametrize("afterwards", AFTERWARDS)
@every_method
@every_case
def test_an_operation_in_place_right_after_leaves_gradients_right(case, method, afterwards):
    s = setup(case, method, dropout=0.0)
    dy = upstream(s.run())
    ref = s.reference()
    ref.y = WITHOUT_INPLACE[afterwards](ref.y)
    expected = ref.gradients(dy)
    after = AFTERWARDS[afterwards]
    runs = {name: _under(hooks, lambda x: after(s.model(x))) for name, hooks in SAVED_TENSOR_HOOKS.items()}
    if case.differentiable:
        runs["reentrant"] = lambda x: checkpoint(lambda x: after(s.model(x)), x, use_reentrant=True)
    runs["non-reentrant"] = lambda x: checkpoint(lambda x: after(s.model(x)), x, use_reentrant=False)
    runs["non-reentrant, late"] = lambda x: after(checkpoint(s.model, x, use_reentrant=False))
    for name, run in runs.items():
        found = found_gradients(s, dy, run)
        for part, gradient in expected.items():
            assert error(found[part], gradient) < 1e-5 * case.tolerance, (name, part)


def _under(hooks, run):
    def inside(x):
        with hooks():
            return run(x)

    return inside


@every_case
def test_an_operation_in_place_right_after_autocast_leaves_gradients_right(case):
    s = setup(case, "dora", AUTOCAST, dropout=0.0)

    def run(x):
        with AUTOCAST.context():
            return s.model(x).mul_(0.5)

    dy = upstream(s.run())
    ref = s.reference()
    ref.y = 0.5 * ref.y
    found = found_gradients(s, dy, run)
    for part, gradient in ref.gradients(dy).items():
        assert error(found[part], gradient) < AUTOCAST.tolerance * case.tolerance, part


@every_method
@every_case
def test_both_kinds_of_checkpointing_find_the_same_gradients(case, method):
    s = setup(case, method, **({"bias": "lora_only"} if case.bias else {}))
    dy = upstream(s.run())
    expected = s.reference().gradients(dy)
    runs = {"non-reentrant": lambda x: checkpoint(s.model, x, use_reentrant=False)}
    if case.differentiable:
        runs["reentrant"] = lambda x: checkpoint(s.model, x, use_reentrant=True)
    for name, run in runs.items():
        found = found_gradients(s, dy, run)
        for part, gradient in expected.items():
            assert error(found[part], gradient) < 1e-5 * case.tolerance, (name, part)


@every_method
@every_case
def test_replicas_of_data_parallel_compute_what_the_layer_does(case, method, monkeypatch):
    s = setup(case, method, **({"bias": "lora_only"} if case.bias else {}))

    def run(x):
        first, second = replicas(s.model, monkeypatch)
        return torch.cat([first(x[:1]), second(x[1:])])

    dy, ref = upstream(s.run()), s.reference()
    found = found_gradients(s, dy, run)
    for part, gradient in ref.gradients(dy).items():
        assert error(found[part], gradient) < 1e-5 * case.tolerance, part
    s.model.eval()
    with torch.no_grad():
        s.run()  # what the layer remembers must not be its replicas'
        assert error(run(s.x), ref.y) < 1e-5 * case.tolerance
        with dt.frozen_scales(s.model):
            assert error(run(s.x), ref.y) < 1e-5 * case.tolerance


@every_case
def test_only_what_needs_a_gradient_gets_one(case):
    s = setup(case)
    dy = upstream(s.run())
    expected = s.reference().gradients(dy)
    for part, p in s.parameters().items():
        for other in s.parameters().values():
            other.requires_grad_(other is p)
        y = s.run(s.x)
        (found,) = torch.autograd.grad(y, [p], dy)
        assert error(found, expected[part]) < 1e-5 * case.tolerance
    if case.differentiable:
        for p in s.parameters().values():
            p.requires_grad_(False)
        x = s.x.clone().requires_grad_()
        (found,) = torch.autograd.grad(s.run(x), [x], dy)
        assert error(found, expected["x"]) < 1e-5 * case.tolerance


@every_method
@every_case
def test_gradients_add_up_over_two_backward_passes(case, method):
    s = setup(case, method)
    dy = upstream(s.run())
    expected = s.reference().gradients(dy)
    y = s.run()
    y.backward(dy, retain_graph=True)
    y.backward(dy)
    for part, p in s.parameters().items():
        assert error(p.grad, 2 * expected[part]) < 1e-5 * case.tolerance, part


@pytest.mark.parametrize("method", [m for m in METHODS if m != "magnitude"])
@pytest.mark.parametrize("case", [c for c in CASES if c.drops], ids=repr)
def test_dropout_falls_on_the_low_rank_path_only(case, method):
    s = setup(case, method, dropout=0.4)
    torch.manual_seed(3)
    if isinstance(s.layer.kind, Linear):
        mask = (~dropped_elements(s.x, 0.4)).to(s.x.dtype) / 0.6
    else:
        mask = F.dropout(torch.ones_like(s.x), 0.4)
    assert 0 < int((mask == 0).sum()) < mask.numel()
    ref = s.reference(dropped=mask)
    torch.manual_seed(3)
    y = s.run()
    assert error(y, ref.y) < 1e-5 * case.tolerance
    dy = upstream(y)
    expected = ref.gradients(dy)

    def again(x):
        torch.manual_seed(3)
        return s.model(x)

    found = found_gradients(s, dy, again)
    for part, gradient in expected.items():
        assert error(found[part], gradient) < 1e-5 * case.tolerance, part
    # in place afterwards, and in evaluation
    found = found_gradients(s, dy, lambda x: again(x).add_(1))
    for part, gradient in expected.items():
        assert error(found[part], gradient) < 1e-5 * case.tolerance, part
    s.model.eval()
    assert error(s.run(), s.reference().y) < 1e-5 * case.tolerance


# Copies and files


@every_method
@every_case
def test_copies_are_equal_and_independent(case, method):
    s = setup(case, method)
    s.model.eval()
    with torch.no_grad():
        expected = s.run().clone()
        for twin in (copy.deepcopy(s.model), pickle.loads(pickle.dumps(s.model))):
            assert torch.equal(s.run(model=twin), expected)
            before = snapshot(s.model)
            for p in twin.parameters():
                p.mul_(1.5)
            assert_same(before, snapshot(s.model))
            assert torch.equal(s.run(), expected)
            twin.train()
            with torch.enable_grad():
                s.run(model=twin).sum().backward()
            assert all(p.grad is None for p in s.model.parameters())
            dt.detach(twin)
            assert torch.equal(s.run(), expected)


@every_method
@every_case
def test_state_dict_round_trip(case, method):
    s = setup(case, method)
    other = setup(case, method, moved=False)
    other.model.eval()
    s.model.eval()
    with torch.no_grad():
        first = other.run()
        expected = s.run()
        other.model.load_state_dict(s.model.state_dict())
        assert not torch.equal(other.run(), first)
        assert torch.equal(other.run(), expected)
        third = setup(case, method, moved=False)
        third.model.load_state_dict(copy.deepcopy(s.model.state_dict()), assign=True)
        assert torch.equal(third.run(model=third.model.eval()), expected)


@every_case
def test_a_plain_checkpoint_fills_the_base_of_an_adapted_model(case):
    s = setup(case, moved=False)
    torch.manual_seed(9)
    plain = case.make()
    state = {f"layer.{n}": t for n, t in plain.state_dict().items()}
    missing, unexpected = s.model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(".base_layer." not in n for n in missing)
    with dt.disabled(s.model):
        assert torch.equal(s.run(), plain(s.x))
    assert error(s.run(), s.reference().y) < 1e-5 * case.tolerance


@every_case
def test_explain_names_the_path(case):
    s = setup(case)
    (path, reason) = dt.explain(s.model)["layer"]
    assert path == case.path
    assert bool(reason) == (path != "dense, fused input gradient")


# Compilation

COMPILED = [
    ("linear", "dora", FLOAT32),
    ("linear", "lora", FLOAT32),
    ("linear", "magnitude", FLOAT32),
    ("linear", "dora-exact", FLOAT32),
    ("linear", "dora", PRECISIONS[1]),
    ("linear", "dora", PRECISIONS[3]),
    ("linear-hooked", "dora", FLOAT32),
    ("conv2d", "dora", FLOAT32),
    ("conv1d-transformers", "dora", FLOAT32),
    ("embedding-padding", "dora", FLOAT32),
]


@pytest.mark.parametrize(("name", "method", "precision"), COMPILED)
def test_compiled_is_eager(name, method, precision):
    (case,) = (c for c in CASES if c.name == name)
    s = setup(case, method, precision, **({"bias": "lora_only"} if case.bias else {}))
    torch._dynamo.reset()
    compiled = torch.compile(s.model, fullgraph=True, backend="aot_eager")
    tolerance = precision.tolerance * case.tolerance
    dy = upstream(s.run())
    expected = s.reference().gradients(dy)
    found = found_gradients(s, dy, lambda x: s.run(x, compiled))
    for part, gradient in expected.items():
        assert error(found[part], gradient) < tolerance, part
    s.model.eval()
    with torch.no_grad():
        before = s.run(model=compiled)
        assert error(before, s.reference().y) < tolerance
        for part, p in s.parameters().items():
            p.mul_(1.5)
            after = s.run(model=compiled)
            assert not torch.equal(before, after), part
            assert error(after, s.reference().y) < tolerance, part
            before = after
    torch._dynamo.reset()


@pytest.mark.parametrize(("backend", "dynamic"), [("inductor", None), ("aot_eager", True)])
def test_compiled_with_shapes_that_change(backend, dynamic):
    (case,) = (c for c in CASES if c.name == "linear")
    s = setup(case)
    torch._dynamo.reset()
    compiled = torch.compile(s.model, fullgraph=True, dynamic=dynamic, backend=backend)
    for x in (s.x, torch.randn(4, 7, 12), torch.randn(2, 3, 12)):
        s.x = x
        dy = upstream(s.run())
        expected = s.reference().gradients(dy)
        found = found_gradients(s, dy, compiled)
        for part, gradient in expected.items():
            assert error(found[part], gradient) < 1e-5, part
    torch._dynamo.reset()
