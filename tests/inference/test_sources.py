import json

import pytest

import doratune as dt
from doratune.cli import main
from doratune.inference.sources import find_sources
from inference.small import save_moved, save_writer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_writer(tmp_path_factory.mktemp("assets") / "model")


def test_the_base_is_the_one_that_the_adapter_names(base, tmp_path):
    found = find_sources([str(save_moved(tmp_path / "one", base))])
    assert found.base == str(base)
    assert found.adapters == {"one": tmp_path / "one"}


def test_a_whole_model_needs_no_adapter(base):
    assert find_sources([str(base)]).base == str(base)
    assert find_sources([], str(base)).adapters == {}


def test_names_come_from_folders_or_their_runs(base, tmp_path):
    places = ("x y/adapter", "two", "other/two", "base")
    folders = [str(save_moved(tmp_path / place, base)) for place in places]
    assert list(find_sources(folders).adapters) == ["x_y", "two", "two-2", "base-2"]


def test_a_classifier_that_peft_wrote_is_for_predict(base, tmp_path):
    file = save_moved(tmp_path / "stars", base) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": "SEQ_CLS"}))
    with pytest.raises(dt.AdapterError, match="was trained for SEQ_CLS; use doratune predict"):
        find_sources([str(tmp_path / "stars")])


def test_every_wrong_folder_is_listed(base, tmp_path):
    run = save_moved(tmp_path / "run" / "adapter", base).parent
    (tmp_path / "file").touch()
    broken = save_moved(tmp_path / "broken", base)
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    nameless = save_moved(tmp_path / "nameless", None)
    folders = [str(path) for path in (run, tmp_path / "absent", tmp_path / "file", broken, nameless)]
    with pytest.raises(dt.AdapterError) as caught:
        find_sources(folders)
    said = str(caught.value)
    for part in ("5 problems", f"did you mean {run / 'adapter'}?", "does not exist", "is a file", "cannot be read"):
        assert part in said
    assert f"{nameless} does not name its base model; give it with --base" in said


def test_adapters_of_different_models_need_a_base(base, tmp_path):
    one, two = save_moved(tmp_path / "one", base), save_moved(tmp_path / "two", base)
    config = json.loads((two / "adapter_config.json").read_text())
    (two / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "owner/other"}))
    with pytest.raises(dt.AdapterError, match=r"different base models.*two of owner/other"):
        find_sources([str(one), str(two)])
    assert len(find_sources([str(one), str(two)], str(base)).adapters) == 2


def test_names_keep_letters_of_any_alphabet(base, tmp_path):
    folders = [save_moved(tmp_path / name, base) for name in ("Märchen 1", "日本", "中国")]
    assert list(find_sources([*map(str, folders)], str(base)).adapters) == ["Märchen_1", "日本", "中国"]


def test_one_base_under_two_names(base, tmp_path, monkeypatch):
    monkeypatch.chdir(base.parent)
    folders = [str(save_moved(tmp_path / name, named)) for name, named in (("one", "model"), ("two", base))]
    assert find_sources(folders).base == "model"


def test_a_base_that_moved_away(base, tmp_path):
    adapter = save_moved(tmp_path / "one", tmp_path / "gone")
    with pytest.raises(dt.AdapterError, match=r"gone: no such folder \(named by the adapter.*--base"):
        find_sources([str(adapter)])


@pytest.mark.parametrize("command", ["generate", "predict", "merge"])
@pytest.mark.parametrize("gone", ["absent-model", "/absent/place/model"])
def test_every_command_says_how_to_name_another_place(command, gone, tmp_path, monkeypatch, capsys):
    """A relative path seen from another folder looks like a name on the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    adapter = str(save_moved(tmp_path / "one", gone))
    if command == "predict":
        config = tmp_path / "one" / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "task_type": "SEQ_CLS"}))
    more = {"generate": ["--prompt", "a"], "predict": [__file__], "merge": ["--output", str(tmp_path / "out")]}
    assert main([command, adapter, *more[command]]) == 1
    said = capsys.readouterr().err
    assert gone in said
    assert "(named by the adapter; another place can be given with --base)" in said
    assert main([command, adapter, *more[command], "--base", gone]) == 1
    assert "named by the adapter" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect RUN", "merge RUN --output OUT", "bench absent --adapter RUN"])
def test_a_run_instead_of_its_adapter(command, base, tmp_path, capsys):
    run = save_moved(tmp_path / "run" / "adapter", base).parent
    assert main(command.replace("RUN", str(run)).replace("OUT", str(tmp_path / "out")).split()) == 1
    said = capsys.readouterr().err
    assert f"has no adapter_config.json; it is not an adapter's folder (did you mean {run / 'adapter'}?)" in said


def test_nothing_named():
    with pytest.raises(dt.AdapterError, match="name an adapter's folder, or a model with --base"):
        find_sources([])
