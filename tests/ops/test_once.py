"""Gradients of gradients: an error and no gradient with a part missing."""

import pytest
import torch
from torch import nn

import doratune as dt


def penalised(model, x):
    """The loss with a penalty on the input's gradient, as of a critic."""
    y = model(x)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return y.mean() + dx.square().mean()


@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize("norm_gradient", ["detached", "exact"])
@pytest.mark.parametrize("hooked", [False, True])
def test_a_penalty_whose_gradient_would_miss_the_last_layer_is_an_error(hooked, norm_gradient, method):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))
    if hooked:
        model[2].register_forward_hook(lambda *args: None)
    dt.attach(model, dt.AdapterConfig(method=method, norm_gradient=norm_gradient, rank=2, targets=["2"]))
    with pytest.raises(RuntimeError, match="differentiate twice"):
        penalised(model, torch.randn(3, 4, requires_grad=True)).backward()


def test_a_graph_that_is_not_used_is_no_error():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))
    dt.attach(model, dt.AdapterConfig(rank=2, targets=["0", "2"]))
    x = torch.randn(3, 4, requires_grad=True)
    parameters = list(dt.trainable_parameters(model).values())
    expected = torch.autograd.grad(model(x).sum(), parameters)
    found = torch.autograd.grad(model(x).sum(), parameters, create_graph=True)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
