import json

import pytest

from doratune.cli import main
from study.test_estimate import LLAMA


@pytest.fixture
def folder(tmp_path):
    LLAMA.save_pretrained(tmp_path)  # config.json and nothing else
    return str(tmp_path)


def test_from_a_config_alone(folder, capsys):
    assert main(["estimate", folder, "--tokens", "128", "--devices", "8", "--checkpointing", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    parts = ("weights", "gathered", "adapters", "gradients", "optimizer", "activations")
    assert found["total"] == sum(found[name] for name in parts)
    assert found["assumptions"]
    assert main(["estimate", folder, "--tokens", "128", "--quantize", "nf4"]) == 0
    told = capsys.readouterr().out
    assert "assumed:" in told
    assert "TFLOP a step" in told


def test_what_cannot_be_estimated_is_said(folder, capsys):
    assert main(["estimate", folder, "--tokens", "1", "--devices", "0", "--method", "lora", "--rank", "0"]) == 1
    told = capsys.readouterr().err
    assert all(word in told for word in ("tokens must be", "devices must be", "rank must be"))
    assert main(["estimate", folder + "/absent"]) == 1
