"""W of base layers as numbers."""

import pytest
import torch
from torch import Tensor, nn

import doratune as dt
from doratune.layers.weights import linear_rows, rows_by_forward
from doratune.ops import row_norm
from helpers import error


class Counting(nn.Linear):
    """A forward of its own that notes how many rows it was given."""

    rows: list[int]

    def forward(self, x: Tensor) -> Tensor:
        self.rows = [*getattr(self, "rows", []), x.shape[0]]
        return nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_a_weight_known_by_its_forward_is_walked_in_blocks(monkeypatch, dtype, tolerance):
    base = Counting(50, 30, dtype=dtype)
    nn.init.constant_(base.bias, 50.0)  # in 16 bits W would drown beside it
    monkeypatch.setitem(row_norm.TILE_BYTES, "cpu", 4 * 7 * (50 + 3 * 30))
    rows, plain = rows_by_forward(base), linear_rows(base)
    A = torch.randn(4, 50, requires_grad=True)
    assert error(row_norm.base_squared_norm(rows.tiles), row_norm.base_squared_norm(plain.tiles)) < tolerance
    assert max(base.rows) == 7
    base.rows.clear()
    U, expected = row_norm.skinny_product(rows.tiles, A), row_norm.skinny_product(plain.tiles, A)
    assert max(base.rows) == 4
    assert error(U, expected) < tolerance
    weights = torch.randn_like(U)
    (found,) = torch.autograd.grad((U * weights).sum(), A)
    assert error(found, torch.autograd.grad((expected * weights).sum(), A)[0]) < tolerance
    ((_, W),) = rows.tiles()
    assert error(W, base.weight) < tolerance


@pytest.mark.parametrize("norm_gradient", ["detached", "exact"])
def test_training_runs_no_identity_through_a_forward_of_its_own(norm_gradient):
    model = nn.Sequential(Counting(64, 8))
    dt.attach(model, dt.AdapterConfig(rank=2, targets=["0"], norm_gradient=norm_gradient))
    model[0].base_layer.rows.clear()
    model(torch.randn(3, 64)).sum().backward()
    assert max(model[0].base_layer.rows) == 3
