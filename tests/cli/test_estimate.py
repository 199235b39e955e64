import json

import pytest
from transformers import BartConfig, BertConfig, GPT2Config, GPTNeoConfig, ViTConfig

from doratune.cli import main
from study.test_estimate import LLAMA


@pytest.fixture
def folder(tmp_path):
    LLAMA.save_pretrained(tmp_path)  # config.json and nothing else
    return str(tmp_path)


def test_from_a_config_alone(folder, capsys):
    more = ("--devices", "8", "--fsdp", "--gradient-checkpointing", "--json")
    assert main(["estimate", folder, "--tokens", "128", *more]) == 0
    found = json.loads(capsys.readouterr().out)
    parts = ("weights", "gathered", "adapters", "gradients", "optimizer", "activations")
    assert found["total"] == sum(found[name] for name in parts)
    assert found["assumptions"]
    assert found["tokens"] == 128
    assert "json" not in found
    assert main(["estimate", folder, "--tokens", "128", "--quantize", "nf4"]) == 0
    told = capsys.readouterr().out
    assert "assumed:" in told
    assert "TFLOP a step" in told


def test_what_cannot_be_estimated_is_said(folder, capsys):
    assert main(["estimate", folder, "--tokens", "1", "--devices", "0", "--method", "lora", "--rank", "0"]) == 1
    told = capsys.readouterr().err
    assert all(word in told for word in ("tokens must be", "devices must be", "rank must be"))
    assert main(["estimate", folder + "/absent"]) == 1
    capsys.readouterr()
    assert main(["estimate", folder, "--fsdp", "--quantize", "nf4"]) == 1
    told = capsys.readouterr().err
    assert "fsdp does not spread quantised weights (nf4)" in told
    assert "fsdp spreads a model over devices, and this is one" in told


def test_a_step_is_no_longer_than_the_models_context(tmp_path, capsys):
    GPT2Config(n_layer=1).save_pretrained(tmp_path)
    assert main(["estimate", str(tmp_path)]) == 1
    assert f"tokens is 4096, but {tmp_path} takes sequences of 1024 at most" in capsys.readouterr().err


@pytest.mark.parametrize(
    "config", [ViTConfig(), BertConfig(), BartConfig(), GPTNeoConfig(attention_types=[[["global"], 24]])]
)
def test_another_kind_of_model_is_one_message(config, tmp_path, capsys):
    config.save_pretrained(tmp_path)
    assert main(["estimate", str(tmp_path), "--tokens", "64"]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: a step of a {config.model_type} cannot be estimated: ")
    assert "served are causal language models" in told
    assert len(told) < 600
    assert "GPT2Config, " not in told, "the list of every configuration class"


def test_an_encoder_that_was_made_to_write_is_served(tmp_path):
    BertConfig(num_hidden_layers=1, is_decoder=True).save_pretrained(tmp_path)
    assert main(["estimate", str(tmp_path), "--tokens", "64"]) == 0
