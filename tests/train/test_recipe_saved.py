"""Recipes that are written: the one beside the results, and what --print-recipe shows."""

import pytest
from rich.console import Console

from doratune.cli import main
from doratune.train import AdapterOptions, TrainConfig, load_recipe, train
from doratune.train.recipe import differences, explain, save_recipe
from train.tiny import save_model, write_text

CONFIG = TrainConfig(
    model="m",
    data=("a b", 'c"d'),
    prompt_template="{x}\n\\ü",
    save_every=None,
    warmup=0.5,
    augment=("crop", "flip"),
    adapter=AdapterOptions(rank=3, targets=("q_proj",), rank_pattern={"v.*": 0}, dropout=0.5),
)


def test_a_saved_recipe_says_the_same(tmp_path):
    save_recipe(tmp_path / "recipe.toml", CONFIG)
    again = TrainConfig(**load_recipe(tmp_path / "recipe.toml"))
    assert again == CONFIG
    assert again.adapter_config() == CONFIG.adapter_config()
    assert differences(tmp_path / "recipe.toml", again) == []
    again.steps, again.resume = 7, True
    assert differences(tmp_path / "recipe.toml", again) == ['steps was "none", is 7']


FLAGS = ["--learning-rate", "0.5", "--rank=3", "--batch_size", "4", "--no-double-quant"]  # 4 is the default, too


def test_where_each_value_comes_from(tmp_path, capsys):
    recipe = tmp_path / "r.toml"
    recipe.write_text('model = "m"\ndata = ["d"]\nsteps = 5\n[adapter]\nrank = 2\n')
    assert main(["train", "--recipe", str(recipe), "--print-recipe", *FLAGS]) == 0
    printed = capsys.readouterr().out
    lines = dict(line.rsplit("  # ", 1) for line in printed.splitlines())
    sources = {key.split(" = ")[0]: source for key, source in lines.items()}
    assert sources["steps"] == sources["model"] == "recipe"
    assert sources["learning_rate"] == sources["rank"] == sources["batch_size"] == sources["double_quant"] == "flag"
    assert sources["alpha"] == sources["save_every"] == "default"
    (tmp_path / "printed.toml").write_text(printed)
    again = TrainConfig(**load_recipe(tmp_path / "printed.toml"))
    assert (again.steps, again.learning_rate, again.adapter.rank) == (5, 0.5, 3)


def test_patterns_of_a_recipe_may_share_a_name_and_flags_win_over_them(tmp_path, capsys):
    patterns = {"rank_pattern": {"q_proj": 2, "steps": 1}, "alpha_pattern": {"q_proj": 4.5}}
    save_recipe(tmp_path / "r.toml", TrainConfig("m", ("d",), adapter=AdapterOptions(**patterns)))
    command = ["train", "--recipe", str(tmp_path / "r.toml"), "--print-recipe"]
    assert main([*command, "--rank-pattern", "v_proj", "8"]) == 0
    (tmp_path / "printed.toml").write_text(capsys.readouterr().out)
    found = TrainConfig(**load_recipe(tmp_path / "printed.toml")).adapter
    assert (found.rank_pattern, found.alpha_pattern) == ({"v_proj": 8}, {"q_proj": 4.5})
    with pytest.raises(SystemExit):
        main([*command, "--rank-pattern", "v_proj"])
    assert "expected names, each with a number; found" in capsys.readouterr().err


def test_everything_is_explained_without_a_recipe():
    assert len(explain(CONFIG, ()).splitlines()) > 50
    assert 'save_every = "none"' in explain(CONFIG, ())


def test_the_recipe_beside_the_results_reproduces_them(tmp_path):
    model, text = save_model(tmp_path / "model"), write_text(tmp_path / "text.txt")
    adapter = AdapterOptions(rank=2, dropout=0.1)
    first = train(
        TrainConfig(str(model), (str(text),), tmp_path / "a", steps=3, max_length=16, seed=5, adapter=adapter),
        Console(quiet=True),
    )
    again = TrainConfig(**{**load_recipe(tmp_path / "a" / "recipe.toml"), "output": tmp_path / "b"})
    assert train(again, Console(quiet=True)).loss_after == first.loss_after
