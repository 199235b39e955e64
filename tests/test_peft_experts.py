"""Mixtures whose dense MLPs PEFT takes for the experts."""

import copy
import json

import peft
import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import doratune as dt
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
