"""What examples/dora_as_lora.py measures: the base and the adapter as their run measured them, and LoRA beside them."""

import json
import math
import re

import pytest

from dora_as_lora import Options, main
from doratune.cli import main as doratune
from train.tiny import save_model, write_text


def test_it_measures_what_the_run_measured(tmp_path, capsys):
    base, text = save_model(tmp_path / "base"), write_text(tmp_path / "text.txt")
    fast = ["--max-length", 16, "--steps", 4, "--batch-size", 2, "--rank", 2, "--learning-rate", "0.05"]
    run = ["train", "--model", base, "--data", text, "--output", tmp_path / "run", *fast, "--save-every", "None"]
    assert doratune([str(word) for word in run]) == 0
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    capsys.readouterr()
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        main(Options(tmp_path / "run", ranks=(16,), peft_rank=2))
    found = dict(re.findall(r"^ *(.*?)  .* ([\d.]+) *$", capsys.readouterr().out, re.MULTILINE))
    assert list(found) == ["base", "adapter", "LoRA, rank 16", "merged", "PEFT's LoRA, rank 2"]
    assert float(found["base"]) == pytest.approx(math.exp(result["loss_before"]), rel=1e-4)
    assert float(found["adapter"]) == pytest.approx(math.exp(result["loss_after"]), rel=1e-4)
    for same in ("merged", "LoRA, rank 16"):
        assert float(found[same]) == pytest.approx(float(found["adapter"]), rel=1e-4)
