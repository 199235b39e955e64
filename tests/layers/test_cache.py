"""What a layer remembers, and every way to make it stale."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import doratune as dt
from doratune.layers.cache import ScaleCache, _Stamp
from doratune.layers.weights import linear_rows
from helpers import error, move, one_layer
from helpers_cases import CASES, Setup, setup

KINDS = [c for c in CASES if c.name in ("linear", "linear-hooked", "conv1d-transformers", "embedding")]
every_kind = pytest.mark.parametrize("case", KINDS, ids=repr)


def right(s: Setup, tolerance: float = 1e-5) -> None:
    """The output in evaluation, where g is remembered, is the definition's at the present values."""
    assert not s.model.training
    with torch.no_grad():
        for _ in range(2):
            assert error(s.run(), s.reference().y) < tolerance
    with torch.inference_mode():
        assert error(s.run(), s.reference().y) < tolerance


def warm(case, **options) -> Setup:
    """A moved adapter in evaluation, its g remembered."""
    s = setup(case, **options)
    s.model.eval()
    right(s)
    return s


def test_g_is_remembered_in_evaluation_and_only_there(monkeypatch):
    from doratune.ops import row_norm

    calls = []
    original = row_norm.squared_row_norm
    monkeypatch.setattr(row_norm, "squared_row_norm", lambda *a: calls.append(1) or original(*a))
    s = setup(KINDS[0])
    calls.clear()
    s.model.eval()
    with torch.no_grad():
        for _ in range(4):
            s.run()
    assert len(calls) == 1
    with torch.inference_mode():
        s.run()
    assert len(calls) == 1
    s.run()  # evaluation, but with gradients
    s.run()
    assert len(calls) == 3
    s.model.train()
    with torch.no_grad():
        s.run(), s.run()
    assert len(calls) == 5


def test_the_frozen_weights_norm_is_computed_once(monkeypatch):
    from doratune.ops import row_norm

    calls = []
    original = row_norm.base_squared_norm
    monkeypatch.setattr(row_norm, "base_squared_norm", lambda *a: calls.append(1) or original(*a))
    s = setup(KINDS[0])
    for _ in range(3):
        s.run().sum().backward()
    assert len(calls) == 1


def _in_place(s, part):
    with torch.no_grad():
        s.parameters()[part].mul_(1.7).add_(0.1)


def _optimizer(s, part):
    optimizer = torch.optim.Adam([s.parameters()[part]], lr=0.3)
    s.run().square().sum().backward()
    optimizer.step()


def _fused_optimizer(s, part):
    """torch's fused kernels leave no version; gradients set to 0 do not say that a step begins."""
    p = s.parameters()[part]
    optimizer = torch.optim.AdamW([p], lr=0.3, fused=True)
    s.run().square().sum().backward()
    with torch.no_grad():
        s.run()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def _data_then_toggle(s, part):
    s.parameters()[part].data.mul_(1.7).add_(0.1)
    s.model.train()
    s.model.eval()


def _replaced_data(s, part):
    p = s.parameters()[part]
    p.data = p.data * 1.7 + 0.1


def _replaced_parameter(s, part):
    group = {"A": s.layer.lora_A, "B": s.layer.lora_B, "m": s.layer.magnitude}[part]
    group["default"] = nn.Parameter(group["default"].detach() * 1.7 + 0.1)


CHANGES = [_in_place, _optimizer, _fused_optimizer, _data_then_toggle, _replaced_data, _replaced_parameter]


@pytest.mark.parametrize("part", ["A", "B", "m"])
@pytest.mark.parametrize("how", CHANGES, ids=lambda f: f.__name__)
@every_kind
def test_changes_of_the_adapter_are_seen(case, how, part):
    s = warm(case)
    with torch.no_grad():
        before = s.run().clone()
    how(s, part)
    right(s)
    with torch.no_grad():
        assert not torch.equal(s.run(), before)


def _weight_in_place(s):
    with torch.no_grad():
        s.layer.base_layer.weight.mul_(1.5).add_(0.1)


def _weight_data(s):
    weight = s.layer.base_layer.weight
    weight.data = weight.data * 1.5 + 0.1


def _weight_data_in_the_same_memory(s):
    """An allocator gives the memory of a weight that was replaced to the next one of its size."""
    weight = s.layer.base_layer.weight
    memory = weight.detach().clone().numpy()
    weight.data = torch.from_numpy(memory)
    right(s)
    weight.data = torch.empty(0)
    memory *= 1.5
    weight.data = torch.from_numpy(memory)


def _weight_data_then_toggle(s):
    s.layer.base_layer.weight.data.mul_(1.5).add_(0.1)
    s.model.train()
    s.model.eval()


def _weight_replaced(s):
    base = s.layer.base_layer
    base.weight = nn.Parameter(base.weight.detach() * 1.5 + 0.1, requires_grad=False)


def _loaded(s):
    state = {n: t * 1.5 if t.is_floating_point() else t for n, t in s.model.state_dict().items()}
    s.model.load_state_dict(state)


def _loaded_assigning(s):
    state = {n: t * 1.5 if t.is_floating_point() else t for n, t in s.model.state_dict().items()}
    s.model.load_state_dict(state, assign=True)


def _layer_loaded(s):
    state = {n: t * 1.5 if t.is_floating_point() else t for n, t in s.layer.base_layer.state_dict().items()}
    s.layer.base_layer.load_state_dict(state)


def _vector(s):
    parameters = list(s.model.parameters())
    vector = nn.utils.parameters_to_vector(parameters).detach() * 1.5
    nn.utils.vector_to_parameters(vector, parameters)


@pytest.mark.parametrize(
    "how",
    [
        _weight_in_place,
        _weight_data,
        _weight_data_in_the_same_memory,
        _weight_data_then_toggle,
        _weight_replaced,
        _loaded,
        _loaded_assigning,
        _layer_loaded,
        _vector,
    ],
    ids=lambda f: f.__name__,
)
@every_kind
def test_changes_of_the_weight_are_seen(case, how):
    s = warm(case)
    how(s)
    right(s)
    s.model.train()
    assert error(s.run(), s.reference().y) < 1e-5


@every_kind
def test_casting_and_moving_are_seen(case):
    s = warm(case)
    s.model.double().float()
    right(s)
    s.model.bfloat16()
    s.model.float()  # W was rounded
    right(s)
    s.model.to("cpu")
    right(s)


@every_kind
def test_switching_is_seen(case):
    s = warm(case)
    dt.attach(s.model, dt.AdapterConfig(rank=3, alpha=9, targets=["layer"]), "other")
    move(s.model, seed=7, name="other")
    s.model.eval()
    for name in ("default", "other", "default"):
        dt.set_adapter(s.model, name)
        right(s)
    dt.delete_adapter(s.model, "default")
    dt.set_adapter(s.model, "other")
    right(s)


@every_kind
def test_rescaling_is_seen(case):
    s = warm(case)
    s.layer.adapters["default"].scale *= 2
    right(s)


@every_kind
def test_copies_remember_for_themselves(case):
    s = warm(case)
    for twin in (copy.deepcopy(s.model), pickle.loads(pickle.dumps(s.model))):
        other = Setup(case, s.precision, twin, s.x)
        _in_place(other, "B")
        right(other)
        right(s)


@pytest.mark.parametrize("refresh", ["forward", "step"])
@every_kind
def test_another_thread_may_clear_what_is_just_being_looked_at(case, refresh, monkeypatch):
    s = warm(case, norm_refresh=refresh)
    fits = _Stamp.fits

    def cleared_meanwhile(stamp, *tensors):
        answer = fits(stamp, *tensors)
        s.layer.cache.clear()
        return answer

    monkeypatch.setattr(_Stamp, "fits", cleared_meanwhile)
    right(s)
    s.run()


def test_a_scale_remembered_under_inference_mode_can_be_used_elsewhere():
    s = setup(KINDS[0])
    s.model.eval()
    with torch.inference_mode():
        s.run()
    with torch.no_grad():
        s.run()
    s.run().sum().backward()
    s.model.train()
    s.run().sum().backward()
    assert error(s.run(), s.reference().y) < 1e-5


def test_a_model_made_in_inference_mode_works():
    with torch.inference_mode():
        s = setup(KINDS[0])
        s.model.eval()
        assert error(s.run(), s.reference().y.detach()) < 1e-5
        s.parameters()["B"].mul_(2)
        assert error(s.run(), s.reference().y.detach()) < 1e-5


# frozen_scales


def test_frozen_scales_are_computed_once_whatever_the_mode(monkeypatch):
    from doratune.ops import row_norm

    calls = []
    original = row_norm.squared_row_norm
    monkeypatch.setattr(row_norm, "squared_row_norm", lambda *a: calls.append(1) or original(*a))
    s = setup(KINDS[0])
    expected = s.run().detach()
    calls.clear()
    with dt.frozen_scales(s.model):
        for mode in (True, False):
            s.model.train(mode)
            assert torch.equal(s.run(), expected)
        assert len(calls) == 1
    s.model.train()
    s.run()
    assert len(calls) == 2


def test_frozen_scales_end_with_their_context():
    s = setup(KINDS[0])
    with pytest.raises(ZeroDivisionError), dt.frozen_scales(s.model):
        raise ZeroDivisionError
    _in_place(s, "B")
    assert error(s.run(), s.reference().y) < 1e-5
    with dt.frozen_scales(s.model):
        with dt.frozen_scales(s.model):
            pass
        assert one_layer(s.model).cache.frozen is not None
    assert one_layer(s.model).cache.frozen is None


def test_frozen_scales_of_a_part_of_the_weight_end_with_their_context():
    """Under tensor parallelism, where a process's part has a memory of its own."""
    rows = linear_rows(nn.Linear(4, 3).requires_grad_(False))
    A, B, m = torch.randn(2, 4), torch.randn(3, 2), torch.ones(3)
    cache = ScaleCache()

    def g(frozen):
        cache.of_part.frozen = frozen  # as in a forward
        return cache.of_part.evaluation(rows, A, B, m, 1.0).g

    before, frozen = g(None), torch.full((3,), 5.0)
    cache.freeze(frozen)
    assert torch.equal(g(frozen), frozen)
    cache.freeze(None)
    assert torch.equal(g(None), before)


def test_frozen_scales_do_not_leak_into_another_adapter():
    s = setup(KINDS[0])
    dt.attach(s.model, dt.AdapterConfig(rank=3, alpha=9, targets=["layer"]), "other")
    move(s.model, seed=7, name="other")
    s.model.eval()
    with torch.no_grad(), dt.frozen_scales(s.model):
        with dt.frozen_scales(s.model):
            dt.set_adapter(s.model, "default")
            assert error(s.run(), s.reference().y) < 1e-5
        assert error(s.run(), s.reference().y) < 1e-5
    right(s)


@pytest.mark.parametrize(
    "how", [_loaded, _loaded_assigning, _weight_replaced, _weight_in_place], ids=lambda f: f.__name__
)
def test_compiled_code_sees_a_changed_weight(how):
    """As eager code does: a compiled model must not go on with the |W|^2 of another W."""
    s = setup(KINDS[0])
    torch._dynamo.reset()
    s.model.eval()
    right(s)  # |W|^2 is remembered
    compiled = torch.compile(s.model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert error(s.run(model=compiled), s.reference().y) < 1e-5
        how(s)
        assert error(s.run(model=compiled), s.reference().y) < 1e-5
    torch._dynamo.reset()


# Once for each step of the optimiser


def _norms(monkeypatch):
    from doratune.ops import row_norm

    calls = []
    original = row_norm.squared_row_norm
    monkeypatch.setattr(row_norm, "squared_row_norm", lambda *a: calls.append(1) or original(*a))
    return calls


def stepwise(case) -> Setup:
    s = setup(case, norm_refresh="step")
    s.model.train()
    s.run()
    return s


@every_kind
def test_the_norm_can_be_remembered_between_micro_batches(case, monkeypatch):
    s = stepwise(case)
    calls = _norms(monkeypatch)
    optimizer = torch.optim.AdamW(s.model.parameters(), lr=0.1)
    for step in range(3):
        for _ in range(4):
            y = s.run()
            assert error(y, s.reference().y) < 1e-5
            y.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert len(calls) == step + 1


@pytest.mark.parametrize("part", ["A", "B", "m"])
@pytest.mark.parametrize("how", CHANGES, ids=lambda f: f.__name__)
@every_kind
def test_a_remembered_norm_sees_changes_of_the_adapter(case, how, part):
    s = stepwise(case)
    how(s, part)
    s.model.train()
    assert error(s.run(), s.reference().y) < 1e-5


@pytest.mark.parametrize(
    "how",
    [_weight_in_place, _weight_data, _weight_data_then_toggle, _weight_replaced, _loaded, _layer_loaded, _vector],
    ids=lambda f: f.__name__,
)
@every_kind
def test_a_remembered_norm_sees_changes_of_the_weight(case, how):
    s = stepwise(case)
    how(s)
    s.model.train()
    assert error(s.run(), s.reference().y) < 1e-5


@every_kind
def test_a_remembered_norm_sees_rescaling_and_casting(case):
    s = stepwise(case)
    s.layer.adapters["default"].scale *= 2
    assert error(s.run(), s.reference().y) < 1e-5
    s.model.double().float()
    assert error(s.run(), s.reference().y) < 1e-5


def test_gradients_are_those_of_a_fresh_norm():
    fresh, kept = setup(KINDS[0]), stepwise(KINDS[0])
    for s in (fresh, kept):
        for _ in range(2):
            s.run().square().sum().backward()
    for f, e in zip(kept.model.parameters(), fresh.model.parameters(), strict=True):
        assert (f.grad is None) == (e.grad is None)
        assert f.grad is None or torch.equal(f.grad, e.grad)


@pytest.mark.parametrize("part", ["A", "B", "m"])
@every_kind
def test_steps_of_optimisers_that_leave_no_trace_are_seen(case, part):
    """bitsandbytes' 8-bit ones write with kernels of their own; a model trained in evaluation mode is not switched."""
    s = warm(case)
    for _ in range(2):
        s.run().square().sum().backward()
        s.parameters()[part].data.mul_(1.5)  # no new version
        right(s)


@pytest.mark.parametrize("part", ["A", "B"])
def test_a_remembered_norm_sees_steps_that_leave_no_trace(part):
    s = setup(KINDS[0], norm_refresh="step")
    for _ in range(3):
        for p in s.parameters().values():
            p.grad = None
        assert error(s.run(), s.reference().y) < 1e-5
        s.run().square().sum().backward()
        s.parameters()[part].data.mul_(1.5)


def _checkpointed(s, x, reentrant):
    if not reentrant:
        return checkpoint(s.run, x, use_reentrant=False)
    one = torch.ones((), requires_grad=True)  # gradients pass through inputs only
    return checkpoint(lambda x, one: one * s.run(x), x, one, use_reentrant=True)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_checkpointing_computes_the_norm_once(case, reentrant, monkeypatch):
    s = setup(case)
    calls = _norms(monkeypatch)
    x = s.x.clone().requires_grad_(case.differentiable)
    for step in range(1, 3):
        y = _checkpointed(s, x, reentrant)
        expected = s.reference()
        y.backward(torch.ones_like(y))
        wanted = expected.gradients(torch.ones_like(y))
        for part, p in s.parameters().items():
            assert error(p.grad, wanted[part]) < 1e-5, part
        assert len(calls) == step
        torch.optim.SGD(s.model.parameters(), lr=0.01).step()
        s.model.zero_grad()


def test_parameters_that_move_before_the_second_forward_are_seen():
    s = setup(KINDS[0])
    y = _checkpointed(s, s.x, reentrant=True)
    with torch.no_grad():
        s.parameters()["A"].mul_(1.5)
    expected = s.reference()
    y.backward(torch.ones_like(y))
    for part, grad in expected.gradients(torch.ones_like(y)).items():
        if part in s.parameters():
            assert error(s.parameters()[part].grad, grad) < 1e-5


def test_an_exact_norm_has_a_graph_in_every_forward(monkeypatch):
    s = setup(KINDS[0], norm_gradient="exact")
    calls = _norms(monkeypatch)
    y = _checkpointed(s, s.x, reentrant=False)
    y.backward(torch.ones_like(y))
    assert len(calls) == 2
    for part, grad in s.reference().gradients(torch.ones_like(y)).items():
        if part in s.parameters():
            assert error(s.parameters()[part].grad, grad) < 1e-5
