"""Another adapter as a plain LoRA adapter: as near as its rank allows, on every kind of layer, in everybody's files."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import doratune as dt
from doratune.convert import LayerFit
from doratune.merge import merged_weight
from doratune.targets import adapted_layers
from file_helpers import IDS, build, load_peft, peft_model, save_peft, tensors
from file_helpers import output as logits
from helpers import DORA, assert_same, error, ids, move, output, snapshot, tiny, tiny_llama
from helpers_cases import CASES, METHODS, PRECISIONS, setup

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def moved(config=DORA, model=None, amount=0.2):
    return move(dt.attach(tiny() if model is None else model, config), amount)


def changes(model, name="default"):
    """By path what an adapter adds to each weight, float64."""
    return {
        path: merged_weight(layer, name).double()
        - torch.cat([tile for _, tile in layer.weight_rows().tiles()]).double()
        for path, layer in adapted_layers(model).items()
    }


def full_rank(model):
    return max(min(layer.weight_rows().shape) for layer in adapted_layers(model).values())


# How near it comes


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("config", [DORA, dt.AdapterConfig(rank=0)], ids=["dora", "magnitude"])
def test_it_keeps_what_the_best_approximation_keeps(config, rank):
    model = moved(config)
    wanted = changes(model)
    report = dt.convert_to_lora(model, rank)
    found = changes(model, "lora")
    assert report.rank == rank
    assert [layer.path for layer in report.layers] == list(wanted)
    total = lost = 0.0
    for layer in report.layers:
        D = wanted[layer.path]
        squares = torch.linalg.svdvals(D).square()
        assert layer.kept == pytest.approx(float(squares[:rank].sum() / squares.sum()), abs=1e-5)
        assert layer.kept == pytest.approx(1 - float((found[layer.path] - D).square().sum() / squares.sum()), abs=1e-5)
        total += float(squares.sum())
        lost += float((found[layer.path] - D).square().sum())
    assert report.kept == pytest.approx(1 - lost / total, abs=1e-5)
    assert 0 < report.kept < 1


@given(rank=st.integers(1, 8), own=st.integers(0, 6), amount=st.sampled_from([0.01, 0.2, 1.0]), seed=st.integers(0, 99))
def test_with_more_ranks_it_comes_nearer(rank, own, amount, seed):
    model = move(dt.attach(tiny(), dt.AdapterConfig(rank=own)), amount, seed)
    first = dt.convert_to_lora(model, rank)
    second = dt.convert_to_lora(model, 2 * rank, to="second")
    assert 0 < first.kept <= second.kept + 1e-6 <= 1 + 2e-6
    for less, more in zip(first.layers, second.layers, strict=True):
        assert less.kept <= more.kept + 1e-6


@pytest.mark.parametrize("precision", PRECISIONS, ids=repr)
@pytest.mark.parametrize("method", ["dora", "lora", "magnitude"])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_with_all_ranks_it_is_the_same_function(case, method, precision):
    s = setup(case, method, precision, **({"bias": "lora_only"} if case.bias else {}))
    s.model.eval()
    with torch.no_grad():
        expected = s.run()
        with precision.context():
            report = dt.convert_to_lora(s.model, full_rank(s.model))
        assert report.kept > 1 - 1e-6
        assert not s.layer.magnitude.keys() - {"default"}
        assert error(s.run(), expected) < 2 * precision.tolerance * case.tolerance
        dt.set_adapter(s.model, "default")
        assert torch.equal(s.run(), expected)


@pytest.mark.parametrize("method", ["dora", "magnitude"])
def test_rows_of_zeros(method):
    """Row 1 trains as a plain LoRA row, row 2 has a magnitude, row 3 is switched off by one of 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7))
    with torch.no_grad():
        model[0].weight[1:4] = 0
    move(dt.attach(model, dt.AdapterConfig(**{"rank": 3} | METHODS[method])))
    with torch.no_grad():
        model[0].magnitude["default"][1:4] = torch.tensor([0.0, 0.3, 0.0])
    x = torch.randn(5, 9)
    expected = output(model, x)
    dt.convert_to_lora(model, 7)
    assert error(output(model, x), expected) < 1e-5


def test_an_adapter_that_changes_nothing():
    model = dt.attach(tiny(), DORA)
    expected = output(model, ids())
    report = dt.convert_to_lora(model)
    assert report.kept == 1.0
    assert {(layer.kept, layer.change, layer.lost) for layer in report.layers} == {(1.0, 0.0, 0.0)}
    assert torch.equal(output(model, ids()), expected)
    assert LayerFit("", 0.0, 0.0).kept == 1.0


def test_projections_of_an_attention():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1)
    moved(dt.AdapterConfig(rank=2), model)
    x = torch.randn(2, 5, 8)
    expected = output(model, x)
    dt.convert_to_lora(model, 8)
    assert error(output(model, x), expected) < 1e-5


def test_a_quantised_base_is_taken_as_it_dequantises():
    import bitsandbytes as bnb

    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 48, compute_dtype=torch.float32)
    plain = nn.Linear(64, 48)
    layer.weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
    layer.support_avx512bf16_for_cpu = False
    model = moved(dt.AdapterConfig(rank=4, targets=["0"]), nn.Sequential(layer))
    x = torch.randn(6, 64)
    expected = output(model, x)
    assert dt.convert_to_lora(model, 48).kept > 1 - 1e-6
    assert error(output(model, x), expected) < 1e-4


def test_weights_that_are_elsewhere_between_forwards():
    from accelerate import cpu_offload

    expected = output(moved(), ids())
    model = moved(model=cpu_offload(tiny(), execution_device=torch.device("cpu")))
    dt.convert_to_lora(model, 16)
    assert error(output(model, ids()), expected) < 1e-4


def test_whatever_torchs_default_dtype():
    model = moved(model=nn.Sequential(nn.Linear(600, 520)))
    expected = dt.convert_to_lora(copy.deepcopy(model), 8).kept
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert dt.convert_to_lora(model, 8).kept == pytest.approx(expected, abs=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)


# What the new adapter is


def test_what_goes_with_it_is_copied():
    model = build("mlp")
    dt.attach(model, dt.AdapterConfig(targets=["lin"], bias="all", modules_to_save=["head"], rank=2))
    with torch.no_grad():
        for parameter in dt.trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.train()(IDS)  # which moves the running statistics of the adapter's own head
    model.eval()
    expected = logits(model)
    dt.convert_to_lora(model, 8)
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    with dt.disabled(model):
        assert not torch.allclose(logits(model), expected, **CLOSE)
    for path, layer in adapted_layers(model).items():
        if "default" in layer.adapter_bias:
            assert torch.equal(layer.adapter_bias["lora"], layer.adapter_bias["default"]), path
            assert layer.adapter_bias["lora"] is not layer.adapter_bias["default"]
    for saved in dt.targets.saved_modules(model).values():
        first, second = (saved.copies[name].state_dict() for name in ("default", "lora"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_it_is_active_and_frozen_and_the_old_one_stays():
    model = moved()
    before = {key: p.detach().clone() for key, p in dt.trainable_parameters(model).items()}
    dt.convert_to_lora(model, 3, to="plain")
    assert dt.active_adapter(model) == "plain"
    assert dt.adapter_names(model) == ["default", "plain"]
    assert not dt.trainable_parameters(model)
    dt.set_adapter(model, "default")
    assert all(torch.equal(before[key], p) for key, p in dt.trainable_parameters(model).items())


@pytest.mark.parametrize(
    ("config", "rank"),
    [
        (dt.AdapterConfig(rank=3), 3),
        (dt.AdapterConfig(rank=3, rank_pattern={"up": 7}), 7),
        (dt.AdapterConfig(rank=0), 16),
        (dt.AdapterConfig(rank=64), 16),
    ],
    ids=["its own", "the highest", "of magnitudes alone", "no more than is of use"],
)
def test_the_rank_when_none_is_given(config, rank):
    assert dt.convert_to_lora(moved(config)).rank == rank


def test_a_lora_adapter_gets_a_lower_rank_or_a_single_one():
    config = dt.AdapterConfig(method="lora", rank=6, rank_pattern={"up": 2}, alpha_pattern={"down": 3})
    model = moved(dt.AdapterConfig(**{**vars(config), "rank_stabilized": True}))
    expected = output(model, ids())
    assert dt.convert_to_lora(model).kept > 1 - 1e-6
    assert error(output(model, ids()), expected) < 1e-5
    assert 0.5 < dt.convert_to_lora(model, 4, to="smaller").kept < 1 - 1e-3
    with pytest.raises(dt.AdapterError, match="default"):
        dt.convert_to_lora(dt.attach(tiny(), DORA, "other"))


# What cannot be


@pytest.mark.parametrize("rank", [0, -1, 17, 2.0, True, "8"])
def test_ranks_that_cannot_be(rank):
    model = moved()
    before = snapshot(model)
    with pytest.raises(dt.AdapterError, match=r"rank must be a whole number from 1 to 16, .*; found "):
        dt.convert_to_lora(model, rank)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "magnitude"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(value, part):
    model = moved()
    with torch.no_grad():
        for path in ("q_proj", "up"):
            getattr(getattr(model.layers[1], path), part)["default"].view(-1)[0] = value
    before = snapshot(model)
    for name in [name for name, tensor in before["values"].items() if not torch.isfinite(tensor).all()]:
        del before["values"][name]  # NaN is not equal to itself
    numbers = torch.random.get_rng_state()
    with pytest.raises(dt.AdapterError, match="2 problems") as caught:
        dt.convert_to_lora(model)
    assert "layers.1.q_proj: its change is not finite" in str(caught.value)
    assert "layers.0" not in str(caught.value)
    assert torch.equal(torch.random.get_rng_state(), numbers)
    after = snapshot(model)
    for name in after["values"].keys() - before["values"].keys():
        del after["values"][name]
    assert_same(before, after)


def test_names_that_are_not_there_or_taken():
    model = moved()
    with pytest.raises(dt.AdapterError, match=r"no adapter 'other' to convert; it has default"):
        dt.convert_to_lora(model, name="other")
    with pytest.raises(dt.AdapterError, match="already has an adapter 'default'"):
        dt.convert_to_lora(model, to="default")


def test_without_data():
    with torch.device("meta"):
        model = tiny()
    dt.attach(model, DORA)
    with pytest.raises(dt.AdapterError, match="holds no data yet"):
        dt.convert_to_lora(model)


# Files


PATTERNS = {"rank_pattern": {"q_proj": 2, "v_proj": 5}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True}
FILES = {
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}),
    "llama-patterns": ("llama", {"target_modules": ["q_proj", "v_proj", "up_proj"], **PATTERNS}),
    "llama-embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "llama-saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "gpt2-bias": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    "convolutions": ("convolutions", {"target_modules": ["0", "2", "5"], "bias": "lora_only"}),
}


@pytest.mark.parametrize("rank", [2, None], ids=["rank 2", "all ranks"])
@pytest.mark.parametrize("case", FILES)
def test_peft_reads_the_same_function(case, rank, tmp_path):
    name, lora = FILES[case]
    base = build(name)
    theirs = peft_model(base, **{"r": 4, "lora_alpha": 6, **lora, "use_dora": True})
    ours = dt.load_adapter(copy.deepcopy(base), save_peft(theirs, tmp_path / "dora"))
    rank = rank or full_rank(ours)
    dt.convert_to_lora(ours, rank)
    dt.save_adapter(ours, tmp_path / "lora", "lora")
    found = logits(load_peft(base, tmp_path / "lora"))
    torch.testing.assert_close(found, logits(ours), rtol=1e-5, atol=1e-5)
    assert torch.allclose(found, logits(theirs), **CLOSE) == (rank != 2)
    options = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (options["r"], options["lora_alpha"], options["use_dora"], options["use_rslora"]) == (
        rank,
        rank,
        False,
        False,
    )
    assert (options["rank_pattern"], options["alpha_pattern"]) == ({}, {})  # vLLM does not read them
    assert options["bias"] == lora.get("bias", "none")
    assert not [key for key in tensors(tmp_path / "lora") if "magnitude" in key]


def test_keys_are_those_that_servers_look_for(tmp_path):
    model = moved(model=tiny_llama())
    dt.convert_to_lora(model)
    dt.save_adapter(model, tmp_path, "lora")
    found = tensors(tmp_path)
    for path, layer in adapted_layers(model).items():
        out, columns = layer.base_layer.weight.shape
        assert found.pop(f"base_model.model.{path}.lora_A.weight").shape == (4, columns)
        assert found.pop(f"base_model.model.{path}.lora_B.weight").shape == (out, 4)
    assert not found


def test_transformers_own_loader_reads_the_same_function(tmp_path):
    model = moved(model=tiny_llama())
    adapted, tokens = logits(model, ids()).detach(), ids()
    dt.convert_to_lora(model, 16)
    dt.save_adapter(model, tmp_path, "lora")
    theirs = tiny_llama()
    theirs.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(theirs, tokens), adapted, **CLOSE)


def test_pefts_own_conversion_leaves_the_magnitudes_out(tmp_path):
    """What docs/generate.md says of it."""
    from peft import PeftModel, convert_to_lora

    model = moved(dt.AdapterConfig(rank=4, targets=["q_proj"]), tiny_llama())
    dt.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        _, found = convert_to_lora(theirs, rank=4)
    for path, D in changes(model).items():
        layer, key = adapted_layers(model)[path], f"base_model.model.{path}"
        BA = found[f"{key}.lora_B.weight"] @ found[f"{key}.lora_A.weight"]
        direction = layer.adapters["default"].scale * layer.lora_B["default"] @ layer.lora_A["default"]
        assert error(BA, direction) < 1e-5
        assert error(BA, D) > 0.1
