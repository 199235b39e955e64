import copy
import sys

import bitsandbytes
import pytest
import torch
from torch import nn

import doratune as dt
from doratune.ops import row_norm
from doratune.study import adapter_change, decompose
from helpers import one_layer
from train.tiny import llama


def by_hand(w, v):
    w, v = w.double(), v.double()
    cosine = nn.functional.cosine_similarity(w, v, dim=1, eps=0).nan_to_num(1.0)  # a padding row is 0 in both
    return float((v.norm(dim=1) - w.norm(dim=1)).abs().mean()), float((1 - cosine).mean())


def moved(config, model=None):
    model = dt.attach(model or llama(), config)
    with torch.no_grad():
        for parameter in dt.trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model


def test_the_same_weights_have_not_moved():
    state = llama().state_dict()
    found = decompose(state, copy.deepcopy(state))
    assert all(d.magnitude == 0 and d.direction == pytest.approx(0, abs=1e-15) for d in found.values())


def test_scaled_rows_change_magnitude_alone_and_turned_rows_direction_alone():
    w = torch.randn(6, 5)
    scale = torch.linspace(0.5, 2, 6)[:, None]
    (scaled,) = decompose({"a.weight": w}, {"a.weight": w * scale}).values()
    assert scaled.magnitude == pytest.approx(float((w.norm(dim=1) * (scale[:, 0] - 1).abs()).mean()), rel=1e-6)
    assert scaled.relative_magnitude == pytest.approx(scaled.magnitude / float(w.norm(dim=1).mean()), rel=1e-6)
    assert scaled.direction == pytest.approx(0, abs=1e-12)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5).double())
    (turned,) = decompose({"a.weight": w.double()}, {"a.weight": w.double() @ rotation}).values()
    assert turned.magnitude == pytest.approx(0, abs=1e-12)
    assert turned.direction == pytest.approx(by_hand(w, w.double() @ rotation)[1], rel=1e-6)
    (opposite,) = decompose({"a.weight": w}, {"a.weight": -w}).values()
    assert opposite.direction == pytest.approx(2)


def test_zero_rows():
    w = torch.eye(3)[:, :2].contiguous()
    assert w[2].eq(0).all()
    (still,) = decompose({"w": w}, {"w": w}).values()
    assert (still.magnitude, still.direction) == (0, 0)
    grown = w.clone()
    grown[2, 0] = 3.0
    (found,) = decompose({"w": w}, {"w": grown}).values()
    assert (found.magnitude, found.direction) == (pytest.approx(1), pytest.approx(1 / 3))


def test_small_changes_of_bf16_weights_are_seen():
    w = torch.randn(64, 64).bfloat16()
    v = w.float() * (1 + 1e-5)
    (found,) = decompose({"w": w}, {"w": v}).values()
    assert found.relative_magnitude == pytest.approx(1e-5, rel=1e-2)


def test_tiles_give_the_same(monkeypatch):
    state, after = llama(0).state_dict(), llama(1).state_dict()
    whole = decompose(state, after)
    monkeypatch.setattr(sys.modules["doratune.study.matrix"], "TILE", 16 * 3)
    tiled = decompose(state, after)
    for path, found in whole.items():
        assert tiled[path].direction == pytest.approx(found.direction, rel=1e-9)
        assert found.direction == pytest.approx(by_hand(state[path + ".weight"], after[path + ".weight"])[1], rel=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        dt.AdapterConfig(rank=4),
        dt.AdapterConfig(rank=4, method="lora"),
        dt.AdapterConfig(rank=0),
        dt.AdapterConfig(rank=4, targets=["embed_tokens", "up_proj"]),
        dt.AdapterConfig(rank=4, modules_to_save=["lm_head"]),
    ],
    ids=["dora", "lora", "magnitude", "embedding", "saved"],
)
def test_an_adapted_model_counts_as_if_merged(config):
    base, model = llama(), moved(config)
    found = decompose(base, model)
    inside = adapter_change(model)
    assert found["model.layers.0.mlp.up_proj"].magnitude > 0
    merged = decompose(base, dt.merge(model))
    assert found.keys() == merged.keys()
    for path, change in merged.items():
        assert found[path].magnitude == pytest.approx(change.magnitude, rel=1e-4, abs=1e-6)
        assert found[path].direction == pytest.approx(change.direction, rel=1e-4, abs=1e-6)
    for path, change in inside.items():
        assert change == found[path]


def test_a_weight_that_only_its_forward_knows_is_made_once(monkeypatch):
    """And not for each of the many slices that are looked at."""
    forwards = []

    class OwnForward(nn.Linear):
        def forward(self, x):
            forwards.append(x)
            return super().forward(x)

    model = moved(dt.AdapterConfig(rank=2, targets=["0"]), nn.Sequential(OwnForward(16, 24)))
    counts, found = [], []
    for tile in (32, 1 << 17):
        monkeypatch.setattr("doratune.study.matrix.TILE", tile)
        forwards.clear()
        found.append(adapter_change(model)["0"])
        counts.append(len(forwards))
    assert counts[0] == counts[1] > 0
    assert found[0].magnitude == pytest.approx(found[1].magnitude)
    assert found[0].direction == pytest.approx(found[1].direction)


@pytest.mark.parametrize("tile", [128, 448])
def test_slices_and_tiles_may_end_in_different_rows(tile, monkeypatch):
    base = bitsandbytes.nn.Linear4bit(64, 24, bias=False, compute_dtype=torch.float32).to("cpu")
    model = moved(dt.AdapterConfig(rank=2, targets=["0"]), nn.Sequential(base))
    expected = adapter_change(model)["0"]
    monkeypatch.setattr("doratune.study.matrix.TILE", tile)
    monkeypatch.setitem(row_norm.TILE_BYTES, "cpu", 4 * 64 * 5)
    assert len(list(one_layer(model).weight_rows().tiles())) > 2
    found = adapter_change(model)["0"]
    assert found.magnitude == pytest.approx(expected.magnitude)
    assert found.direction == pytest.approx(expected.direction)


def test_a_disabled_adapter_does_not_count():
    base, model = llama(), moved(dt.AdapterConfig(rank=4))
    with dt.disabled(model):
        assert all(d.magnitude == 0 for d in decompose(base, model).values())


def test_refusals():
    with pytest.raises(dt.AdapterError, match="no weight in common"):
        decompose({"a": torch.ones(2, 2)}, {"b": torch.ones(2, 2)})
    with pytest.raises(dt.AdapterError, match=r"shapes differ.*a: before \(2, 2\), after \(3, 2\)"):
        decompose({"a": torch.ones(2, 2)}, {"a": torch.ones(3, 2)})
    model = moved(dt.AdapterConfig(rank=4))
    with pytest.raises(dt.AdapterError, match="give the model itself"):
        decompose(llama().state_dict(), model.state_dict())
    with pytest.raises(dt.AdapterError, match="no adapter is active"):
        adapter_change(llama())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_has_not_moved_by_a_number(value):
    before, after = torch.randn(4, 3), torch.randn(4, 3)
    after[1, 2] = value
    found = decompose({"w": before}, {"w": after}, spectra=True)["w"]
    assert all(number != number for number in (found.magnitude, found.direction, found.size, found.magnitude_share))
    assert found.spectrum is None
