import json

import pytest

import doratune as dt
from doratune.train.information import Information
from doratune.train.model_names import base_name, model_problem
from doratune.train.models import load_base
from train.tiny import llama


def test_problems_seen_without_loading(tmp_path):
    assert "no such folder" in model_problem(str(tmp_path / "absent"))
    assert "no such folder" in model_problem("./absent")
    assert "no config.json" in model_problem(str(tmp_path))
    (tmp_path / "file").touch()
    assert "is a file" in model_problem(str(tmp_path / "file"))
    assert model_problem("owner/name") is None


def test_the_base_that_is_given_goes_before_pefts_and_that_before_our_own(tmp_path):
    dt.save_adapter(dt.attach(llama(), dt.AdapterConfig(rank=2)), tmp_path)
    assert base_name(tmp_path) is None
    with pytest.raises(dt.AdapterError, match="does not name its base model; give it with --base"):
        load_base(tmp_path)
    Information("text-generation", "ours", "dora").save(tmp_path)
    assert base_name(tmp_path) == "ours"
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "theirs"}))
    assert base_name(tmp_path) == "theirs"
    assert base_name(tmp_path, "given") == "given"


def test_a_relative_base_is_looked_for_here_and_beside_the_adapter(tmp_path, monkeypatch):
    adapter, here = tmp_path / "moved" / "adapter", tmp_path / "here"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "../model"}')
    here.mkdir()
    monkeypatch.chdir(here)
    assert base_name(adapter) == "../model"
    (tmp_path / "moved" / "model").mkdir()
    assert base_name(adapter) == str(adapter / "../model")
    (tmp_path / "model").mkdir()
    assert base_name(adapter) == "../model", "the working directory comes first, as in PEFT"
