"""The magnitude of each token's own matrix."""

import pytest
import torch

from doratune.ops.grouped import scale_groups
from helpers import error

GROUPS = torch.tensor([0, 0, 2, 2, 2])


def made(dtype):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, 4, generator=generator).to(dtype).requires_grad_()
    return z, (1 + 0.1 * torch.randn(3, 4, generator=generator)).requires_grad_()


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str
)
def test_outputs_and_gradients(dtype, tolerance, eight_bit):
    z, g = made(dtype)
    y = scale_groups(z, g, GROUPS, eight_bit)
    assert y.dtype == dtype
    wide, own = (t.detach().double().requires_grad_() for t in (z, g))
    expected = wide * own[GROUPS]
    assert error(y, expected) < tolerance
    for out in (y, expected):
        out.square().sum().backward()
    assert error(z.grad, wide.grad) < 2 * tolerance
    assert error(g.grad, own.grad) < (2e-2 if eight_bit else max(2 * tolerance, 1e-6))  # g is float32
    assert not g.grad[1].any()
    with torch.no_grad():
        assert torch.equal(scale_groups(z, g, GROUPS), y)


def test_transforms_see_through():
    z, g = (t.detach() for t in made(torch.float32))
    found = torch.func.grad(lambda g: scale_groups(z, g, GROUPS).square().sum())(g)
    g.requires_grad_()
    scale_groups(z, g, GROUPS).square().sum().backward()
    assert error(found, g.grad) < 1e-6
