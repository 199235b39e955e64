"""Mixtures whose dense MLPs PEFT takes for the experts."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import doratune as dt
from doratune.study.adapter_file import inspect_adapter
from file_helpers import move
from helpers import error, tiny_llama

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def deepseek():
    sizes = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    heads = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**SMALL, **sizes, **heads))


def qwen():
    config = Qwen2MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=16)
    return Qwen2MoeForCausalLM(config)


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(8)[None]).logits


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapters_beside_fused_experts(method, tmp_path, caplog):
    torch.manual_seed(0)
    base = deepseek()
    model = move(dt.attach(copy.deepcopy(base), dt.AdapterConfig(rank=2, method=method)))
    dt.save_adapter(model, tmp_path)
    assert "PEFT takes down_proj, gate_proj, up_proj of a deepseek_v3 for its experts'" in caplog.text
    with pytest.raises(KeyError, match="DORATUNE"):
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert error(logits(dt.load_adapter(base, tmp_path)), logits(model)) < 1e-6


@pytest.mark.filterwarnings("ignore:The following")  # PEFT's, about patterns that it made itself
def test_peft_takes_these_names_for_the_experts():
    """Should it stop to, files of these models could be PEFT's again."""
    config = peft.LoraConfig(r=2, target_modules=["o_proj", "gate_proj", "up_proj", "down_proj"])
    wrapped = peft.get_peft_model(deepseek(), config)
    assert "layers.0.mlp.gate_proj.lora_A" not in " ".join(wrapped.state_dict())
    assert wrapped.peft_config["default"].target_parameters == {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("make", "targets"), [(deepseek, ["o_proj", "q_b_proj"]), (qwen, "all-linear")], ids=["deepseek", "qwen"]
)
def test_what_peft_leaves_where_it_is_is_exchanged(make, targets, tmp_path):
    torch.manual_seed(0)
    base = make()
    model = move(dt.attach(copy.deepcopy(base), dt.AdapterConfig(rank=2, targets=targets)))
    dt.save_adapter(model, tmp_path)
    assert error(logits(peft.PeftModel.from_pretrained(base, tmp_path)), logits(model)) < 1e-5


def test_a_dense_model_with_these_names_is_exchanged(tmp_path):
    model = dt.attach(tiny_llama(), dt.AdapterConfig(rank=2))
    dt.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_a_model_that_takes_no_input_ids_runs_in_peft(tmp_path):
    """PEFT's model for sequence-to-sequence tasks hands them on to whatever it holds."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 8, "max_source_positions": 10}
    signs = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    base = WhisperForConditionalGeneration(WhisperConfig(**sizes, **heads, **signs)).eval()
    model = move(dt.attach(copy.deepcopy(base), dt.AdapterConfig(rank=2)))
    dt.save_adapter(model, tmp_path)
    inputs = {"input_features": torch.randn(1, 8, 20), "labels": torch.tensor([[4, 5]])}
    with torch.no_grad():
        theirs, ours = peft.PeftModel.from_pretrained(base, tmp_path)(**inputs), model(**inputs)
    assert error(theirs.logits, ours.logits) < 1e-5


def gpt_oss():
    return GptOssForCausalLM(GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, head_dim=8))


BOTH = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize("parameters", [BOTH, BOTH[1:], ["mlp.experts.gate_up_proj"]], ids=len)
@pytest.mark.parametrize("modules", [["q_proj"], [], r".*\.q_proj"], ids=str)
@pytest.mark.parametrize("make", [qwen, gpt_oss])
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")  # PEFT looks at modules only
def test_pefts_lora_on_experts_is_read_and_written(make, modules, parameters, tmp_path):
    torch.manual_seed(0)
    base = make()
    options = peft.LoraConfig(
        r=4,
        target_modules=modules,
        target_parameters=parameters,
        rank_pattern={"experts.down_proj": 2},
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), options)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    expected = logits(theirs)
    assert error(expected, logits(base)) > 1e-2
    theirs.save_pretrained(tmp_path / "theirs")
    ours = dt.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert error(logits(ours), expected) < 1e-5
    as_dora = dt.load_adapter(copy.deepcopy(base), tmp_path / "theirs", as_dora=True)
    assert error(logits(as_dora), expected) < 1e-5
    dt.save_adapter(ours, tmp_path / "ours")
    assert error(logits(peft.PeftModel.from_pretrained(base, tmp_path / "ours")), expected) < 1e-5
    ranks = {layer.path.rpartition(".")[2]: layer.rank for layer in inspect_adapter(tmp_path / "ours").layers}
    names = [name.rpartition(".")[2] for name in parameters] + ["q_proj"] * bool(modules)
    assert ranks == {name: 2 if name == "down_proj" else 4 for name in names}


def test_a_dora_on_experts_converts_to_what_peft_reads(tmp_path):
    torch.manual_seed(0)
    base = qwen()
    model = move(dt.attach(copy.deepcopy(base), dt.AdapterConfig(rank=2, targets=["q_proj", "gate_up_proj"])))
    expected = logits(model)
    assert dt.convert_to_lora(model, rank=32, to="plain").kept == pytest.approx(1)
    dt.save_adapter(model, tmp_path, "plain")
    assert error(logits(peft.PeftModel.from_pretrained(base, tmp_path)), expected) < 1e-4


def test_a_file_of_experts_lists_what_does_not_fit(tmp_path):
    torch.manual_seed(0)
    model = move(dt.attach(qwen(), dt.AdapterConfig(rank=2, method="lora", targets=["experts.down_proj"])))
    dt.save_adapter(model, tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.mlp.experts.lora_B.weight"
    weights[key] = weights[key][:, :-1].contiguous()
    del weights[key.replace("layers.0", "layers.1")]
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(dt.AdapterError) as caught:
        dt.load_adapter(qwen(), tmp_path)
    assert [problem.partition(": ")[2] for problem in caught.value.problems] == [
        "expected shape (128, 2), found (32, 7)",
        "missing",
    ]


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")  # PEFT looks at modules only
def test_single_experts_of_transformers_4_come_by_way_of_peft(tmp_path):
    torch.manual_seed(0)
    base = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, head_dim=8))
    key = "base_model.model.model.layers.{}.mlp.experts.{}.{}.lora_{}.weight"
    tensors = {}
    for name, (out, columns) in {"gate_proj": (16, 32), "up_proj": (16, 32), "down_proj": (32, 16)}.items():
        for layer in range(2):
            for expert in range(4):
                tensors[key.format(layer, expert, name, "A")] = 0.3 * torch.randn(2, columns)
                tensors[key.format(layer, expert, name, "B")] = 0.3 * torch.randn(out, 2)
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    names = ["gate_proj", "up_proj", "down_proj"]
    options = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": names, "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(options))
    with pytest.raises(dt.AdapterError, match=r"experts\.0\.down_proj: .*load the file there and save it again"):
        dt.load_adapter(copy.deepcopy(base), tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    theirs.save_pretrained(tmp_path / "again")
    assert error(logits(theirs), logits(base)) > 1e-2
    assert error(logits(dt.load_adapter(base, tmp_path / "again")), logits(theirs)) < 1e-5
