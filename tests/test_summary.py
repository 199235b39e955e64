import pytest
import torch
from torch import nn

import doratune as dt
from helpers import DORA, LORA, tiny, tiny_llama

SIZES = {  # of TinyModel's linear layers: (out, in)
    "q_proj": (16, 16),
    "v_proj": (16, 16),
    "up": (32, 16),
    "down": (16, 32),
}


def test_the_numbers():
    model = tiny()
    base = sum(p.numel() for p in model.parameters())
    dt.attach(model, DORA)
    s = dt.summary(model)
    assert (s.adapters, s.active) == (["default"], "default")
    assert s.base == base
    assert s.direction == 2 * sum(4 * (out + columns) for out, columns in SIZES.values())
    assert s.magnitude == 2 * sum(out for out, _ in SIZES.values())
    assert s.trained == s.direction + s.magnitude == sum(p.numel() for p in dt.trainable_parameters(model).values())
    assert s.extra_over_lora == pytest.approx(s.magnitude / s.direction)
    assert s.extra_over_model == pytest.approx(s.magnitude / base)
    assert [layer.path for layer in s.layers[:4]] == [f"layers.0.{n}" for n in SIZES]
    assert {(layer.kind, layer.method, layer.rank) for layer in s.layers} == {("linear", "dora", 4)}
    assert s.left_alone == {"embed": "not among the targets", "lm_head": "not among the targets"}


def test_it_speaks_of_the_active_adapter():
    model = tiny()
    dt.attach(model, DORA)
    dt.attach(model, dt.AdapterConfig(rank=2, method="lora", targets=["up"], modules_to_save=["lm_head"]), "second")
    s = dt.summary(model)
    assert s.active == "second"
    assert [(layer.path, layer.method, layer.rank, layer.magnitude) for layer in s.layers] == [
        ("layers.0.up", "lora", 2, 0),
        ("layers.1.up", "lora", 2, 0),
    ]
    assert s.saved == {"lm_head": 13 * 16}
    assert s.trained == s.direction + 13 * 16
    assert s.base == sum(p.numel() for p in tiny().parameters())
    assert "layers.0.q_proj" in s.left_alone
    assert s.extra_over_lora == 0


def test_a_plain_model():
    s = dt.summary(tiny())
    assert (s.adapters, s.active, s.layers, s.magnitude, s.extra_over_lora) == ([], None, [], 0, 0)
    assert "adapters: none" in str(s)


def test_words():
    model = tiny()
    dt.attach(model, dt.AdapterConfig(rank=4, rank_pattern={"up": 0}, modules_to_save=["lm_head"]))
    text = str(dt.summary(model))
    for line in (
        "adapters: default; active: default",
        "2 x q_proj (linear): dora, rank 4",
        "2 x up (linear): dora, rank 0",
        "trained whole: lm_head, 208 parameters",
        "left alone: embed (not among the targets)",
        "of LoRA's parameters",
        "of the base model's",
    ):
        assert line in text


def test_what_is_left_alone_in_every_block_takes_one_line():
    model = dt.attach(tiny(), dt.AdapterConfig(rank=4, targets=["q_proj"]))
    text = str(dt.summary(model))
    assert "left alone: 2 x v_proj (not among the targets)" in text
    assert "left alone: embed (not among the targets)" in text
    assert text.count("left alone") == 5


def test_weights_that_no_kind_serves_are_listed():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up = nn.Parameter(torch.zeros(4, 8, 16))
            self.scale = nn.Parameter(torch.zeros(8))
            self.router = nn.Linear(8, 4)

    model = nn.Sequential(nn.Linear(8, 8), Experts())
    dt.attach(model, dt.AdapterConfig(rank=2, targets=["0"]))
    left = dt.summary(model).left_alone
    assert set(left) == {"1.gate_up", "1.router"}
    assert "4x8x16" in left["1.gate_up"]
    assert "Experts" in left["1.gate_up"]


def test_the_share_of_a_real_shape():
    """out / (r (in + out)) of LoRA's parameters, 3 % at rank 16 for a square layer."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 4096, bias=False))
    dt.attach(model, dt.AdapterConfig(rank=16))
    s = dt.summary(model)
    assert s.extra_over_lora == pytest.approx(1 / 32)
    assert s.extra_over_model == pytest.approx(1 / 4096)


def test_explain_speaks_of_every_layer():
    model = tiny()
    dt.attach(model, dt.AdapterConfig(rank=2, dropout=0.1, targets=["up", "embed"]))
    told = dt.explain(model)
    assert set(told) == {"embed", "layers.0.up", "layers.1.up"}
    assert told["layers.0.up"] == ("dense, fused input gradient", "")
    assert told["embed"][1]
    model.layers[1].up.base_layer.register_forward_hook(lambda *a: None)
    assert dt.explain(model)["layers.1.up"] == ("over the base's output", "the base layer has hooks")


def test_explain_names_what_costs_more():
    model = tiny()
    dt.attach(model, dt.AdapterConfig(rank=2, targets=["up"], norm_gradient="exact"))
    layer = model.layers[0].up
    assert dt.explain(model)["layers.0.up"][1] == "norm_gradient is exact: the backward pass walks W once more"
    with torch.no_grad():
        weight = layer.base_layer.weight
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        weight.copy_(u[:, :2] * s[:2] @ v[:2])
        layer.lora_A["default"].copy_(v[:2])
        layer.lora_B["default"].copy_(-0.999 * u[:, :2] * s[:2] / layer.adapters["default"].scale)
    layer.cache.clear()
    layer.decide("default")
    assert "nearly cancel" in dt.explain(model)["layers.0.up"][1]


def test_a_transformers_model():
    model = dt.attach(tiny_llama(tie_word_embeddings=True), LORA)
    s = dt.summary(model)
    assert len(s.layers) == 14
    assert s.base == sum(p.numel() for p in tiny_llama(tie_word_embeddings=True).parameters())
    assert set(s.left_alone) == {"model.embed_tokens", "lm_head"}
