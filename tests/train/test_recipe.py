from pathlib import Path

import pytest

import doratune as dt
from doratune.train import TrainConfig, load_recipe


def write(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_flags_and_table_mean_the_same(tmp_path):
    flat = load_recipe(write(tmp_path, 'learning-rate = 1\nrank = 4\ntargets = ["q_proj"]\noutput = "o"'))
    table = load_recipe(write(tmp_path, 'learning_rate = 1\noutput = "o"\n[adapter]\nrank = 4\ntargets = ["q_proj"]'))
    assert flat == table
    assert flat["output"] == Path("o")
    config = TrainConfig(model="m", data=("d",), **flat)
    assert config.adapter_config() == dt.AdapterConfig(rank=4, targets=("q_proj",))


def test_every_kind_of_value(tmp_path):
    found = load_recipe(
        write(
            tmp_path,
            'data = ["a", "b"]\nsteps = 3\nresume = true\nmagnitude_learning_rate = 0.5\nschedule = "cosine"\n'
            'rank_pattern = {q_proj = 2}\ntargets = "all-linear"\nexclude = ["up_proj"]',
        )
    )
    assert found["data"] == ("a", "b")
    assert found["adapter"].rank_pattern == {"q_proj": 2}
    assert (found["steps"], found["resume"], found["schedule"]) == (3, True, "cosine")


def test_every_problem_is_listed(tmp_path):
    path = write(
        tmp_path,
        'learning_rat = 1\nsteps = "3"\nresume = 1\nschedule = "sqare"\ndata = "one.txt"\nbatch_size = 2.5\n'
        'rank = true\nmethod = "lora"\nalpha = 1\n[adapter]\nalpha = 2\nmethod = "dora"',
    )
    with pytest.raises(dt.AdapterError) as caught:
        load_recipe(path)
    said = str(caught.value)
    assert "9 problems" in said
    assert "method is no option of the adapter: move it above" in said
    assert "unknown key 'learning_rat'; did you mean 'learning_rate'?" in said
    assert "steps: expected whole number or 'none', found '3'" in said
    assert "resume: expected true or false, found 1" in said
    assert (
        "schedule: expected one of 'linear', 'cosine', 'constant', 'polynomial', 'inverse_sqrt', found 'sqare'" in said
    )
    assert "data: expected a list of strings, found 'one.txt'" in said
    assert "batch_size: expected whole number, found 2.5" in said
    assert "rank: expected whole number, found True" in said
    assert "alpha is given twice" in said


@pytest.mark.parametrize("content", [b"a = ", b"\xff\xfe", b"[adapter"])
def test_no_toml(tmp_path, content):
    path = tmp_path / "r.toml"
    path.write_bytes(content)
    with pytest.raises(dt.AdapterError, match="is not TOML"):
        load_recipe(path)


def test_what_editors_of_windows_put_first(tmp_path):
    (tmp_path / "r.toml").write_text('\ufeffmodel = "m"\n', encoding="utf-8")
    assert load_recipe(tmp_path / "r.toml")["model"] == "m"


def test_a_recipe_for_comparing(tmp_path):
    (tmp_path / "r.toml").write_text('model = "m"\n[compare]\nseeds = 3\n', encoding="utf-8")
    with pytest.raises(dt.AdapterError, match="is for doratune compare; to train with it leave the table out"):
        load_recipe(tmp_path / "r.toml")


def test_no_file(tmp_path):
    with pytest.raises(dt.AdapterError, match="cannot be read"):
        load_recipe(tmp_path / "absent.toml")


def test_an_adapter_that_is_no_table(tmp_path):
    with pytest.raises(dt.AdapterError, match="adapter: expected a table"):
        load_recipe(write(tmp_path, "adapter = 3"))
