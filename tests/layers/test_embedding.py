"""What is particular to embeddings."""

import pytest
import torch
from torch import nn

import doratune as dt
from helpers import error, move, one_layer
from helpers_cases import Host, ScaledEmbedding


def host(base, **options):
    model = Host(base)
    return dt.attach(model, dt.AdapterConfig(**{"rank": 4, "targets": ["layer"]} | options))


def test_a_magnitude_for_each_feature_over_the_vocabulary():
    base = nn.Embedding(11, 6)
    layer = one_layer(host(base))
    assert layer.magnitude["default"].shape == (6,)
    assert error(layer.magnitude["default"], base.weight.double().norm(dim=0)) < 1e-6
    assert layer.lora_A["default"].shape == (4, 11)
    assert layer.lora_B["default"].shape == (6, 4)


def test_padding_moves_nothing_in_the_table_of_the_adapter():
    model = host(nn.Embedding(11, 6, padding_idx=2))
    move(model)
    ids = torch.tensor([[2, 3, 2], [5, 2, 2]])
    model(ids).sum().backward()
    grad = one_layer(model).lora_A["default"].grad
    assert not grad[:, 2].any()
    assert grad[:, 3].any()


def test_frequent_tokens_can_be_scaled_down():
    model = host(nn.Embedding(11, 6, scale_grad_by_freq=True))
    move(model)
    A = one_layer(model).lora_A["default"]
    (once,) = torch.autograd.grad(model(torch.tensor([3])).sum(), A)
    (thrice,) = torch.autograd.grad(model(torch.tensor([3, 3, 3])).sum(), A)
    assert error(thrice, once) < 1e-5


def test_a_scaled_embedding_scales_the_change_too():
    base = ScaledEmbedding(11, 6, embed_scale=4.0)
    model = host(base)
    move(model)
    layer = one_layer(model)
    V = base.weight.T.double() + layer.adapters["default"].scale * (
        layer.lora_B["default"].double() @ layer.lora_A["default"].double()
    )
    table = 4 * ((layer.magnitude["default"].double() / V.norm(dim=1))[:, None] * V).T
    assert error(model(torch.arange(11)), table) < 1e-5


class Doubled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 2


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        (nn.Embedding(11, 6, max_norm=1.0), "max_norm"),
        (nn.Embedding(11, 6, sparse=True), "sparse"),
        (Doubled(11, 6), "forward of its own"),
    ],
    ids=["max_norm", "sparse", "own forward"],
)
def test_embeddings_that_cannot_be_served_are_refused_with_the_reason(base, reason):
    model = Host(base)
    with pytest.raises(dt.AdapterError, match=f"layer: .*{reason}"):
        dt.attach(model, dt.AdapterConfig(rank=4, targets=["layer"]))
    assert model.layer is base


def test_bfloat16_embeddings_under_autocast():
    model = host(nn.Embedding(11, 6).bfloat16())
    move(model)
    ids = torch.arange(11)
    expected = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(ids), expected)


def test_a_table_shared_with_the_head_is_left_alone_by_merging():
    model = nn.ModuleDict({"embed": nn.Embedding(11, 6), "head": nn.Linear(6, 11, bias=False)})
    model["head"].weight = model["embed"].weight
    before = model["head"].weight.detach().clone()
    dt.attach(model, dt.AdapterConfig(rank=2, targets=["embed"]))
    move(model)
    ids = torch.arange(11)
    expected = model["embed"](ids)
    dt.merge(model)
    assert error(model["embed"](ids), expected) < 1e-5
    assert torch.equal(model["head"].weight, before)
    assert model["head"].weight is not model["embed"].weight
