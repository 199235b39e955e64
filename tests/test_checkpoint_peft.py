"""Files of PEFT here and files of ours in PEFT: the same function, gradients, keys and options."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import doratune as dt
from doratune.own_options import METADATA
from file_helpers import (
    build,
    gradients,
    load_peft,
    metadata,
    move,
    options,
    output,
    peft_model,
    rewrite,
    save_peft,
    tensors,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}

ATTENTION = ["q_proj", "v_proj"]
CASES = {
    "llama": ("llama", {"target_modules": [*ATTENTION, "down_proj"]}),
    "llama-all": ("llama", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "llama-embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "task_type": "CAUSAL_LM"}),
    "llama-head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "llama-rslora": ("llama", {"target_modules": ATTENTION, "use_rslora": True, "r": 3, "lora_alpha": 5}),
    "llama-patterns": (
        "llama",
        {
            "target_modules": [*ATTENTION, "up_proj", "gate_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 5, ".*gate_proj": 1},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 3, "^model.layers.1.mlp.up_proj": 11},
        },
    ),
    "llama-exclude": ("llama", {"target_modules": ATTENTION, "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "llama-exclude-regex": ("llama", {"target_modules": ATTENTION, "exclude_modules": r".*\.0\..*"}),
    "llama-layers": ("llama", {"target_modules": ATTENTION, "layers_to_transform": [1]}),
    "llama-layer-0": ("llama", {"target_modules": ATTENTION, "layers_to_transform": 0, "layers_pattern": "layers"}),
    "mlp-layers": (
        "mlp",
        {"target_modules": ["lin"], "layers_to_transform": [0, 2], "layers_pattern": ["blocks", "(layers|h)"]},
    ),
    "llama-regex": ("llama", {"target_modules": r"model\.layers\.\d\.(self_attn\.[qk]_proj|mlp\.down_proj)"}),
    "llama-bias": ("llama", {"target_modules": ATTENTION, "bias": "lora_only"}),
    "llama-saved": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}),
    "gpt2-bias": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    "gpt2-embedding": ("gpt2", {"target_modules": ["c_fc", "wpe"], "fan_in_fan_out": True, "r": 2}),
    "bert": ("bert", {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"}),
    "bert-bias": ("bert", {"target_modules": ["query", "value"], "bias": "all", "modules_to_save": ["classifier"]}),
    "bert-embedding": ("bert", {"target_modules": ["word_embeddings", "key"], "modules_to_save": ["classifier"]}),
    "distilbert": ("distilbert", {"target_modules": ["q_lin", "v_lin"], "task_type": "SEQ_CLS"}),
    "convolutions": ("convolutions", {"target_modules": ["0", "2", "5"], "bias": "lora_only"}),
    "mlp-buffers": ("mlp", {"target_modules": ["body"], "modules_to_save": ["head"]}),
    "mlp-bias": ("mlp", {"target_modules": ["lin", "embed"], "bias": "all"}),
    "mlp-bias-saved": (
        "mlp",
        {"target_modules": ["layers.0.lin", "layers.1.lin"], "bias": "all", "modules_to_save": ["head"]},
    ),
}
NOT_OURS = (".original_module.", ".modules_to_save.", ".base_layer.weight")
"""In PEFT's files, not in ours: repeated biases of saved modules, and the base's own embedding tables."""


def own(file: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: t for key, t in file.items() if not any(part in key for part in NOT_OURS)}


@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize("case", CASES)
def test_both_directions(case, method, tmp_path):
    name, lora = CASES[case]
    base = build(name)
    theirs = peft_model(base, **{"r": 4, "lora_alpha": 6, **lora, "use_dora": method == "dora"})
    there, back = save_peft(theirs, tmp_path / "there"), tmp_path / "back"
    expected, expected_gradients = output(theirs), gradients(theirs)
    assert not torch.allclose(expected, output(base), **CLOSE)

    ours = copy.deepcopy(base)
    assert dt.load_adapter(ours, there, trainable=True) is ours
    torch.testing.assert_close(output(ours), expected, **CLOSE)
    found = gradients(ours)
    assert {key for key, gradient in found.items() if gradient.any()} <= expected_gradients.keys()
    for key, gradient in expected_gradients.items():
        torch.testing.assert_close(found[key].view_as(gradient), gradient, **CLOSE)

    dt.save_adapter(ours, back)
    written, read = tensors(back), own(tensors(there))
    assert written.keys() == read.keys()
    for key, tensor in read.items():
        assert torch.equal(written[key], tensor), key
        assert written[key].dtype == tensor.dtype
    assert metadata(there) == {"format": "pt"}
    assert metadata(back).items() >= {"format": "pt"}.items()

    again = load_peft(base, back)
    assert torch.equal(output(again), output(load_peft(base, there)))
    config, original = again.peft_config["default"], theirs.peft_config["default"]
    for option in (
        "r",
        "lora_alpha",
        "lora_dropout",
        "bias",
        "use_dora",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
    ):
        assert getattr(config, option) == getattr(original, option), option
    assert config.rank_pattern == original.rank_pattern
    assert config.fan_in_fan_out == original.fan_in_fan_out
    assert set(again.targeted_module_names) == set(theirs.targeted_module_names)


class Attends(nn.Module):
    """An attention whose biases alone are trained, and a layer that is adapted."""

    def __init__(self):
        super().__init__()
        self.attention, self.up = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True), nn.Linear(8, 8)

    def forward(self, x):
        return self.up(self.attention(x, x, x)[0])


def test_biases_of_an_attention_in_both_directions(tmp_path):
    torch.manual_seed(0)
    base, x = Attends(), torch.randn(2, 3, 8)
    theirs = peft_model(base, target_modules=["up"], r=2, lora_alpha=4, use_dora=True, bias="all")
    there = save_peft(theirs, tmp_path / "there")
    assert "base_model.model.attention.out_proj.bias" in tensors(there)
    ours = dt.load_adapter(copy.deepcopy(base), there)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
    assert not torch.allclose(ours(x), base(x), **CLOSE)
    for name, parameter in ours.named_parameters():
        if "copies" in name:  # all of them, as after more training here
            parameter.data.add_(torch.randn_like(parameter))
    dt.save_adapter(ours, tmp_path / "back")
    torch.testing.assert_close(load_peft(base, tmp_path / "back")(x), ours(x), **CLOSE)


def test_a_file_has_no_options_that_peft_does_not_know(tmp_path):
    base = build("llama")
    there = save_peft(peft_model(base, target_modules=["q_proj"], r=2, lora_alpha=4, use_dora=True), tmp_path / "t")
    model = dt.attach(base, dt.AdapterConfig(targets=["q_proj"], rank=2, alpha=4.0))
    dt.save_adapter(model, tmp_path / "o")
    ours, theirs = options(tmp_path / "o"), options(there)
    assert ours.keys() <= theirs.keys()
    # The task is read off the model's class here; PEFT is told.
    different = {k for k in ours if ours[k] != theirs[k]}
    assert different == {"auto_mapping", "task_type"}
    assert all(
        not theirs[k] or k in ("megatron_core", "peft_version", "qalora_group_size") for k in theirs.keys() - ours
    )


ATTACHED = {
    "llama": ("llama", {}),
    "llama-names": ("llama", {"targets": ATTENTION, "rank_stabilized": True, "norm_gradient": "exact"}),
    "llama-embedding": ("llama", {"targets": ["embed_tokens", "o_proj", "lm_head"]}),
    "llama-regex": ("llama", {"targets": r".*1\.mlp\..*", "exclude": ["up_proj"], "bias": "lora_only"}),
    "gpt2": ("gpt2", {"rank_pattern": {"c_proj": 2}, "alpha_pattern": {"mlp.c_proj": 1.5}}),
    "gpt2-embedding": ("gpt2", {"targets": ["wte", "wpe", "c_attn"], "bias": "all"}),
    "convolutions": ("convolutions", {"targets": ["0", "2", "5"], "bias": "all"}),
    "bert": ("bert", {"modules_to_save": ["classifier"]}),
    "bert-head-frozen": ("bert", {"targets": ["query"]}),
    "distilbert": ("distilbert", {"targets": ["q_lin"]}),
    "bert-all-biases": ("bert", {"targets": ["query"], "bias": "all", "modules_to_save": ["classifier"]}),
    "mlp": ("mlp", {"targets": ["lin", "body"], "modules_to_save": ["head"], "bias": "all"}),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize("case", ATTACHED)
def test_an_adapter_made_here_is_the_same_function_in_peft(case, method, tmp_path):
    name, fields = ATTACHED[case]
    base = build(name)
    config = dt.AdapterConfig(**{"method": method, "rank": 4, "alpha": 6, **fields})
    model = move(dt.attach(copy.deepcopy(base), config))
    dt.save_adapter(model, tmp_path)
    theirs = load_peft(base, tmp_path, is_trainable=True)
    torch.testing.assert_close(output(theirs), output(model), **CLOSE)
    assert not torch.allclose(output(theirs), output(base), **CLOSE)
    if config.norm_gradient == "detached":
        found = gradients(model)
        for key, gradient in gradients(theirs).items():
            torch.testing.assert_close(found[key].view_as(gradient), gradient, **CLOSE)

    again = dt.load_adapter(copy.deepcopy(base), tmp_path, trainable=True)
    assert torch.equal(output(again), output(model))
    layers = dt.targets.adapted_layers(model)
    for path, layer in dt.targets.adapted_layers(again).items():
        ours, before = layer.adapters["default"], layers[path].adapters["default"]
        assert (ours.rank, ours.scale, ours.config.norm_gradient) == (
            before.rank,
            before.scale,
            before.config.norm_gradient,
        )


def test_bf16_models_and_bf16_adapters(tmp_path):
    base = build("llama").bfloat16()
    theirs = peft_model(base, target_modules=["q_proj", "up_proj"], r=4, use_dora=True)
    there = save_peft(theirs, tmp_path / "float32")
    for dtype in (torch.bfloat16, torch.float16):
        folder = save_peft(theirs, tmp_path / str(dtype))
        rewrite(folder, {key: t.to(dtype) for key, t in tensors(folder).items()})
        ours = dt.load_adapter(copy.deepcopy(base).float(), folder)
        torch.testing.assert_close(output(ours), output(load_peft(copy.deepcopy(base).float(), folder)), **CLOSE)
        assert all(p.dtype == torch.float32 for n, p in ours.named_parameters() if "lora" in n or "magnitude" in n)
    ours = dt.load_adapter(copy.deepcopy(base), there, trainable=True)
    dt.save_adapter(ours, tmp_path / "back")
    for key, tensor in tensors(there).items():
        assert torch.equal(tensors(tmp_path / "back")[key], tensor)
    torch.testing.assert_close(output(ours), output(theirs), rtol=0.05, atol=0.1)  # two bf16 models


def test_a_lora_file_starts_a_dora_adapter(tmp_path):
    base = build("llama")
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight[3] = 0
    theirs = peft_model(base, target_modules=["q_proj", "embed_tokens"], r=4, lora_alpha=6, use_rslora=True)
    folder = save_peft(theirs, tmp_path / "lora")
    model = dt.load_adapter(copy.deepcopy(base), folder, as_dora=True, trainable=True)
    torch.testing.assert_close(output(model), output(theirs), **CLOSE)
    layer = dt.targets.adapted_layers(model)["model.layers.0.self_attn.q_proj"]
    assert layer.adapters["default"].config.method == "dora"
    assert layer.magnitude["default"].requires_grad
    dt.save_adapter(model, tmp_path / "dora")
    torch.testing.assert_close(output(load_peft(base, tmp_path / "dora")), output(theirs), **CLOSE)


def test_as_dora_of_a_dora_file_changes_nothing(tmp_path):
    base = build("llama")
    theirs = peft_model(base, target_modules=["q_proj"], r=4, use_dora=True)
    model = dt.load_adapter(copy.deepcopy(base), save_peft(theirs, tmp_path), as_dora=True)
    torch.testing.assert_close(output(model), output(theirs), **CLOSE)


@pytest.mark.parametrize("everywhere", [True, False])
def test_rank_0_is_the_same_function_in_peft_and_comes_back(everywhere, tmp_path):
    base = build("llama")
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight[3] = 0
    fields = {"rank": 0} if everywhere else {"rank": 4, "rank_pattern": {"q_proj": 0, "layers.1.mlp.up_proj": 0}}
    model = move(dt.attach(copy.deepcopy(base), dt.AdapterConfig(**fields)))
    dt.save_adapter(model, tmp_path / "1")
    torch.testing.assert_close(output(load_peft(base, tmp_path / "1")), output(model), **CLOSE)
    before = {n: p.detach().clone() for n, p in dt.trainable_parameters(model).items()}
    for number in (1, 2):  # a second journey must not turn rank 0 into rank 1
        again = dt.load_adapter(copy.deepcopy(base), tmp_path / str(number), trainable=True)
        after = dt.trainable_parameters(again)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[n], before[n]) for n in before)
        dt.save_adapter(again, tmp_path / str(number + 1))


# Zero rows of W


def with_zero_rows() -> nn.Module:
    base = build("llama")
    with torch.no_grad():
        for layer in base.model.layers:
            layer.self_attn.q_proj.weight[[1, 5]] = 0
            layer.mlp.down_proj.weight[0] = 0
        base.model.embed_tokens.weight[:, 2] = 0
    return base


@pytest.mark.parametrize("trained", [False, True])
def test_zero_rows_are_read_by_peft_without_nan_and_come_back_bit_for_bit(trained, tmp_path):
    base = with_zero_rows()
    config = dt.AdapterConfig(rank=4, targets=["q_proj", "down_proj", "embed_tokens"])
    model = dt.attach(copy.deepcopy(base), config)
    if trained:
        optimizer = torch.optim.AdamW(dt.parameter_groups(model, lr=0.05))
        for _ in range(3):
            optimizer.zero_grad()
            output(model).square().mean().backward()
            optimizer.step()
    before = {n: p.detach().clone() for n, p in dt.trainable_parameters(model).items()}
    dt.save_adapter(model, tmp_path)
    assert all(torch.equal(p, before[n]) for n, p in dt.trainable_parameters(model).items())
    theirs = load_peft(base, tmp_path)
    assert torch.isfinite(output(theirs)).all()
    torch.testing.assert_close(output(theirs), output(model), **CLOSE)
    again = dt.load_adapter(copy.deepcopy(base), tmp_path, trainable=True)
    after = dt.trainable_parameters(again)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0, msg=name)
    assert torch.equal(output(again), output(model))


def test_zero_rows_that_peft_trained_on_come_back(tmp_path):
    base = with_zero_rows()
    model = move(dt.attach(copy.deepcopy(base), dt.AdapterConfig(rank=4, targets=["q_proj"])))
    dt.save_adapter(model, tmp_path / "ours")
    theirs = move(load_peft(base, tmp_path / "ours", is_trainable=True), seed=5)  # m differs from the norm now
    there = save_peft(theirs, tmp_path / "theirs")
    ours = dt.load_adapter(copy.deepcopy(base), there, trainable=True)
    assert torch.isfinite(output(theirs)).all()
    torch.testing.assert_close(output(ours), output(theirs), **CLOSE)
    layer = dt.targets.adapted_layers(ours)["model.layers.0.self_attn.q_proj"]
    assert (layer.magnitude["default"][[1, 5]] != 0).all()
    dt.save_adapter(ours, tmp_path / "back")
    for key, tensor in tensors(there).items():
        assert torch.equal(tensors(tmp_path / "back")[key], tensor), key


def test_a_zero_row_that_is_0_in_peft_stays_0(tmp_path):
    base = with_zero_rows()
    theirs = peft_model(base, target_modules=["q_proj"], r=4, use_dora=True)
    layer = theirs.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():  # n > 0, but m = 0: the row's output is its bias
        layer.lora_magnitude_vector["default"].weight[1] = 0
    folder = save_peft(theirs, tmp_path)
    ours = dt.load_adapter(copy.deepcopy(base), folder)
    torch.testing.assert_close(output(ours), output(theirs), **CLOSE)


# What PEFT's files may hold besides


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_base_weight_is_accepted_only_if_it_is_the_models_own(name, tmp_path):
    base = build(name)
    targets = {"llama": ["embed_tokens", "lm_head"], "gpt2": ["c_attn"]}[name]
    theirs = peft_model(base, target_modules=targets, r=2, fan_in_fan_out=name == "gpt2", use_dora=True)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    tables = [key for key in tensors(tmp_path) if "lora" not in key]
    assert tables
    model = dt.load_adapter(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(output(model), output(theirs), **CLOSE)
    changed = tensors(tmp_path)[tables[0]]
    changed[1, 1] += 1
    with pytest.raises(dt.AdapterError, match="differs from the model's own"):
        dt.load_adapter(copy.deepcopy(base), rewrite(tmp_path, {tables[0]: changed}))


@pytest.mark.parametrize("saved", [["embed_tokens", "lm_head"], ["lm_head"]])
def test_embeddings_saved_whole_beside_peft_s_copies_of_them(saved, tmp_path):
    base = build("llama")
    theirs = peft_model(base, target_modules=["q_proj"], modules_to_save=saved, r=2, use_dora=True)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)  # as of itself where the vocabulary was resized
    assert any(".modules_to_save." in key for key in tensors(tmp_path))
    assert any(".original_module." in key for key in tensors(tmp_path))
    model = dt.load_adapter(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(output(model), output(theirs), **CLOSE)


def test_keys_of_older_peft_and_of_compiled_models(tmp_path):
    base = build("llama")
    theirs = peft_model(base, target_modules=["q_proj"], r=2, use_dora=True)
    folder = save_peft(theirs, tmp_path)
    renamed = {
        key.replace("base_model.model.", "base_model.model._orig_mod.").replace("_vector", "_vector.weight"): t
        for key, t in tensors(folder).items()
    }
    rewrite(folder, {**dict.fromkeys(tensors(folder)), **renamed})
    model = dt.load_adapter(copy.deepcopy(base), folder)
    torch.testing.assert_close(output(model), output(theirs), **CLOSE)


def test_saved_modules_that_peft_finds_by_the_end_of_their_name(tmp_path):
    base = build("mlp")
    base.subhead = nn.Linear(2, 2)
    folder = save_peft(peft_model(base, target_modules=["body"], modules_to_save=["head"], r=2), tmp_path / "there")
    assert "base_model.model.subhead.weight" in tensors(folder)
    model = dt.load_adapter(copy.deepcopy(base), folder, trainable=True)
    dt.save_adapter(model, tmp_path / "back")
    assert tensors(tmp_path / "back").keys() == tensors(folder).keys()

    alone = dt.attach(base, dt.AdapterConfig(targets=["body"], modules_to_save=["head"]))
    with pytest.raises(dt.AdapterError, match="subhead as well"):
        dt.save_adapter(alone, tmp_path / "alone")
    assert not (tmp_path / "alone").exists()


def test_the_metadata_holds_what_peft_cannot_say(tmp_path):
    model = dt.attach(build("mlp"), dt.AdapterConfig(rank=0, targets=["body"], norm_gradient="exact"))
    dt.save_adapter(model, tmp_path)
    assert json.loads(metadata(tmp_path)[METADATA])["magnitude_only"] == ["body"]


def test_two_adapters_on_one_model_are_saved_and_read_apart(tmp_path):
    base = build("bert")
    model = copy.deepcopy(base)
    for number, fields in enumerate(
        ({"targets": ["query"], "modules_to_save": ["classifier"]}, {"targets": ["dense"], "method": "lora"})
    ):
        move(dt.attach(model, dt.AdapterConfig(rank=2, **fields), f"a{number}"), seed=number)
    expected = []
    for number in range(2):
        dt.set_adapter(model, f"a{number}")
        expected.append(output(model))
        dt.save_adapter(model, tmp_path / str(number), f"a{number}")
    for number in range(2):
        torch.testing.assert_close(output(load_peft(base, tmp_path / str(number))), expected[number], **CLOSE)
    both = dt.load_adapter(dt.load_adapter(copy.deepcopy(base), tmp_path / "0", "x"), tmp_path / "1", "y")
    assert torch.equal(output(both), expected[1])
    dt.set_adapter(both, "x")
    assert torch.equal(output(both), expected[0])


@pytest.mark.filterwarnings("ignore:The following")
def test_patterns_of_pefts_that_fit_nothing_are_passed_over(tmp_path):
    """PEFT warns of them and writes them."""
    patterns = {"rank_pattern": {"q_proj": 2, "absent": 5}, "alpha_pattern": {"nowhere.*": 3}}
    theirs = peft_model(build("llama"), target_modules=ATTENTION, **patterns)
    save_peft(theirs, tmp_path)
    ours = dt.load_adapter(build("llama"), tmp_path)
    torch.testing.assert_close(output(ours), output(theirs), **CLOSE)
    dt.save_adapter(ours, tmp_path / "again")
    assert options(tmp_path / "again")["rank_pattern"] == {"q_proj": 2}
