import json

import mlx.core as mx
import pytest
import torch
from mlx_lm.utils import load_model
from transformers import AutoConfig, AutoModelForCausalLM, GlmConfig, GlmForCausalLM, LlamaConfig, LlamaForCausalLM

from doratune.cli import main
from doratune.model_files import name_rope_twice, save_model
from inference.small import save_moved, save_writer

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
PLAIN = {"rope_theta": 5e5, "rope_type": "default"}
LLAMA3 = {
    "rope_theta": 5e5,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def saved(folder, model):
    save_model(model, folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("rope", [PLAIN, LLAMA3], ids=["plain", "scaled"])
def test_todays_reader_takes_both(tmp_path, rope):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=dict(rope)))
    found = saved(tmp_path, model)
    assert found["rope_theta"] == 5e5
    assert ("rope_scaling" in found) == (rope is LLAMA3)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.rope_parameters == model.config.rope_parameters
    ids = torch.arange(40)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_whoever_may_read_the_config_may_read_the_weights(tmp_path):
    save_model(LlamaForCausalLM(LlamaConfig(**SIZES)), tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("rope", [PLAIN, LLAMA3], ids=["plain", "scaled"])
def test_mlx_lm_reads_the_older_names(tmp_path, rope):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=dict(rope))).eval()
    ids = torch.arange(40)[None]
    expected = model(ids).logits.detach()
    saved(tmp_path, model)
    theirs = load_model(tmp_path)[0](mx.array(ids.numpy()))
    torch.testing.assert_close(torch.tensor(theirs.tolist()), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_part_of_the_rotation(tmp_path):
    model = GlmForCausalLM(GlmConfig(**SIZES, head_dim=16, num_key_value_heads=2, pad_token_id=0))
    found = saved(tmp_path, model)
    assert found["partial_rotary_factor"] == found["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == model.config.rope_parameters


def test_what_has_no_such_names_is_left_alone(tmp_path):
    for config in ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, {"model_type": "bert"}, {}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        name_rope_twice(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text()) == config


def test_merged_models_have_them(tmp_path):
    base = save_writer(tmp_path / "base")
    adapter = save_moved(tmp_path / "adapter", base)
    assert main(["merge", str(adapter), "--output", str(tmp_path / "merged")]) == 0
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["rope_theta"] == 10000.0
