"""``torch.func`` on every kind of layer: gradients of single examples, adapters side by side, second derivatives."""

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

from helpers import error
from helpers_cases import CASES, METHODS, PRECISIONS, setup, upstream

every_case = pytest.mark.parametrize("case", CASES, ids=repr)
every_method = pytest.mark.parametrize("method", METHODS)
every_precision = pytest.mark.parametrize("precision", PRECISIONS[:2], ids=repr)


def parts(s):
    """Values of the adapter's parameters, and the part that each is, by name."""
    values = {name: p.detach() for name, p in s.model.named_parameters() if p.requires_grad}
    by_identity = {id(p): part for part, p in s.parameters().items()}
    return values, {name: by_identity[id(p)] for name, p in s.model.named_parameters() if id(p) in by_identity}


def loss_of(s):
    def loss(values, x, dy):
        return (functional_call(s.model, values, (x,)).float() * dy).sum()

    return loss


@every_precision
@every_method
@every_case
def test_gradients_of_single_examples_add_up_to_the_references(case, method, precision):
    s = setup(case, method, precision, **({"bias": "lora_only"} if case.bias else {}))
    dy = upstream(s.run())
    expected = s.reference().gradients(dy)
    values, part = parts(s)
    whole = grad(loss_of(s))(values, s.x, dy)
    each = vmap(grad(loss_of(s)), in_dims=(None, 0, 0))(values, s.x[:, None], dy[:, None])
    for name, found in whole.items():
        assert error(found, expected[part[name]]) < precision.tolerance * case.tolerance, name
        assert each[name].shape == (len(s.x), *found.shape)
        assert error(each[name].sum(0), expected[part[name]]) < precision.tolerance * case.tolerance, name


@pytest.mark.parametrize("training", [True, False])
@every_precision
@every_method
@every_case
def test_adapters_side_by_side_are_adapters_one_by_one(case, method, precision, training):
    s = setup(case, method, precision)
    s.model.train(training)
    values, _ = parts(s)
    stacked = {name: torch.stack([p, 1.5 * p]) for name, p in values.items()}
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            found = vmap(lambda values: functional_call(s.model, values, (s.x,)))(stacked)
        expected = [s.reference().y]
        with torch.no_grad():
            for p in s.parameters().values():
                p.mul_(1.5)
            expected.append(s.reference().y)
            for p in s.parameters().values():
                p.div_(1.5)
        for y, e in zip(found, expected, strict=True):
            assert error(y, e) < precision.tolerance * case.tolerance


@pytest.mark.parametrize("method", [m for m in METHODS if m != "magnitude"])  # linear in m: none
@every_case
def test_second_derivatives_are_the_references(case, method):
    s = setup(case, method)
    dy = upstream(s.run())
    values, part = parts(s)
    along = {name: torch.randn_like(p) for name, p in values.items()}

    def slope(values):
        gradients = grad(loss_of(s))(values, s.x, dy)
        return sum((g * along[name]).sum() for name, g in gradients.items())

    ref = s.reference()
    leaves = [ref.leaves[part[name]] for name in values]
    first = torch.autograd.grad((ref.y * dy).sum(), leaves, create_graph=True)
    expected = torch.autograd.grad(sum((g * along[n]).sum() for g, n in zip(first, values, strict=True)), leaves)
    for e, (name, found) in zip(expected, grad(slope)(values).items(), strict=True):
        assert error(found, e) < 1e-4, name


# Importing what torch's forward mode needs warns of another part of torch.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@every_method
@every_case
def test_forward_mode_holds_the_same_norm_still(case, method):
    s = setup(case, method)
    dy = upstream(s.run())
    values, _ = parts(s)
    along = {name: torch.randn_like(p) for name, p in values.items()}
    if case.blocked_column is not None and "A" in s.parameters():
        (name,) = (name for name in along if "lora_A" in name)
        along[name][:, case.blocked_column] = 0  # torch's forward mode does not know padding
    gradients = grad(loss_of(s))(values, s.x, dy)
    expected = sum((gradients[name] * t).sum() for name, t in along.items())
    _, found = jvp(lambda values: loss_of(s)(values, s.x, dy), (values,), (along,))
    assert abs(found - expected) < 1e-4 * sum((gradients[name] * t).abs().sum() for name, t in along.items())


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_dropout_is_drawn_for_each_example(method):
    (case,) = (c for c in CASES if c.name == "linear")
    s = setup(case, method, dropout=0.5)
    values, _ = parts(s)
    x = s.x[:1].expand(2, *s.x.shape[1:])
    first, second = vmap(lambda x: functional_call(s.model, values, (x,)), randomness="different")(x)
    assert not torch.equal(first, second)
    first, second = vmap(lambda x: functional_call(s.model, values, (x,)), randomness="same")(x)
    assert torch.equal(first, second)
