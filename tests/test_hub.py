"""Adapters and models that are named as the model hub names them; no test reaches it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import doratune as dt
from doratune.cli import main
from doratune.hub import OF_AN_ADAPTER, _download, adapter_folder, base_folder
from doratune.train.start import Start
from inference.small import save_moved, save_writer
from train.tiny import llama


def test_a_base_on_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    assert base_folder(str(tmp_path)) == tmp_path
    with pytest.raises(dt.AdapterError, match="does not exist"):
        base_folder("./absent")
    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        if name == "org/gone":
            raise OSError("offline\nand more")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert base_folder("org/model") == tmp_path
    with pytest.raises(dt.AdapterError, match="looked for on the model hub: offline; without a network"):
        base_folder("org/gone")
    assert asked == ["org/model", "org/gone"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one adapter, user/mine, in a cache laid out as huggingface_hub's."""
    import huggingface_hub

    folder = tmp_path / "cache" / "models--user--mine" / "snapshots" / "0123abcd"
    base = save_writer(tmp_path / "base")
    save_moved(folder, base)
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name != "user/mine":
            raise OSError("404 Client Error\nand more")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    _download.cache_clear()
    yield folder, asked
    _download.cache_clear()


def test_an_adapter_of_the_hub(hub):
    folder, asked = hub
    assert adapter_folder("user/mine") == adapter_folder("user/mine") == folder
    assert asked == [("user/mine", OF_AN_ADAPTER)]
    model = dt.load_adapter(llama(), "user/mine")
    expected = load_file(folder / "adapter_model.safetensors")
    dt.save_adapter(model, "again")
    found = load_file("again/adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_names_that_can_only_be_folders_are_not_looked_for(hub, tmp_path):
    _, asked = hub
    (tmp_path / "run").mkdir()
    for name in ("absent", "./user/mine", "~/mine", "/user/mine", "a/b/c", "run/adaptor", "user/", tmp_path / "gone"):
        with pytest.raises(dt.AdapterError, match="does not exist"):
            dt.load_adapter(llama(), name)
    assert asked == []


def test_a_name_that_the_hub_does_not_have(hub):
    model = llama()
    with pytest.raises(dt.AdapterError, match=r"user/gone: there is no folder .* hub: 404 Client Error; without a net"):
        dt.load_adapter(model, "user/gone")
    assert dt.adapter_names(model) == []


def test_without_its_library_a_name_is_a_folder_and_the_extra_is_named(hub, monkeypatch):
    monkeypatch.setattr("doratune.hub.installed", lambda library: False)
    with pytest.raises(
        dt.AdapterError, match=r"user/mine does not exist; .* model hub: pip install 'doratune\[train\]'"
    ):
        dt.load_adapter(llama(), "user/mine")


def test_commands_take_names_of_the_hub(hub, capsys):
    def told(*words):
        assert main(list(words)) == 0
        return capsys.readouterr().out

    written = json.loads(told("generate", "user/mine", "--prompt", "the cat", "--max-tokens", "3", "--json"))
    assert written["adapter"] == "mine"
    assert json.loads(told("inspect", "user/mine", "--json"))["method"] == "dora"
    told("merge", "user/mine", "--output", "merged")
    told("convert", "user/mine", "--output", "lora")
    Path("t.txt").write_text("the cat sat on the mat\n" * 40)
    measured = json.loads(told("evaluate", "user/mine", "--data", "t.txt", "--max-length", "16", "--json"))["measured"]
    assert [one["name"] for one in measured] == ["base", "mine"]
    analysed = json.loads(told("analyze", "base", "user/mine", "--json"))
    assert [run["label"] for run in analysed["runs"]] == ["mine"]
    raced = json.loads(told("bench", "base", "--adapter", "user/mine", "--tokens", "8", "--seconds", "0.01", "--json"))
    assert raced["costs"][-1]["name"] == "given"
    assert Start.read("user/mine").method == "dora"
