import dataclasses
import json

import pytest

from doratune.cli import main
from doratune.errors import DivergedError
from doratune.study.comparison import run as runs
from study.comparison import simulated
from train.tiny import save_model, write_text


@pytest.fixture
def recipe(tmp_path):
    save_model(tmp_path / "model")
    write_text(tmp_path / "text.txt")
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'model = "{tmp_path}/model"\ndata = ["{tmp_path}/text.txt"]\nmax_length = 16\ntest_fraction = 0.2\nrank = 4\n'
        '[compare]\nmethods = ["lora r", "dora r"]\nlearning_rates = [1e-4, 1e-3]\nsweep_seeds = 1\nseeds = 3\n'
    )
    return path


@pytest.fixture
def trained(monkeypatch):
    """Runs that are made up: DoRA's loss is lower by 0.1."""
    seen = []

    def train(config, worker, workers):
        seen.append(config)
        loss = 2.0 - 0.1 * (config.method == "dora") + 0.001 * (config.seed * 7 % 5) - config.learning_rate
        return dataclasses.replace(simulated.result(loss=loss), test_accuracy=None, accuracy_after=None)

    monkeypatch.setattr(runs, "train_apart", train)
    monkeypatch.setattr(runs, "POLL", 0.05)
    return seen


def test_the_table_fits_80_columns(recipe, tmp_path, trained, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    recipe.write_text(recipe.read_text().replace('"dora r"', '"dora r", "full"'))
    assert main(["compare", str(recipe), "--output", str(tmp_path / "out"), "--workers", "2"]) == 0
    header, _, *rows = [line for line in capsys.readouterr().out.splitlines() if line.strip()][:5]
    assert header.split() == ["rate", "test", "loss", "95", "%", "interval", "seeds", "ms/step", "MiB"]
    assert all(row.rstrip()[-1].isdigit() for row in rows)


def test_it_answers_and_goes_on(recipe, tmp_path, trained, capsys):
    command = ["compare", str(recipe), "--output", str(tmp_path / "out"), "--workers", "2"]
    assert main(command) == 0
    printed = capsys.readouterr()
    said = " ".join(printed.out.split()).replace("\u00a0", " ")
    assert "DoRA rank 4 minus LoRA rank 4: −0.1000 nats in every one of 3 pairs" in said
    assert "[10/10] test: " in printed.err
    lines = [line.partition("] ")[2] for line in printed.err.splitlines() if ": LoRA" in line or ": DoRA" in line]
    assert len(lines) == len(set(lines)) == 10, "each run once"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report", "study.db"]
    assert main([*command, "--seeds", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out" / "report" / "numbers.json").read_text())
    assert [one["learning_rate"] for one in found["standings"]] == [1e-3, 1e-3]
    assert found["differences"][0]["count"] == 5
    assert len(trained) == 4 + 2 * 5
    recipe.write_text(recipe.read_text().replace("max_length = 16", "max_length = 8"))
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "is of another recipe: name another --output or --study, or undo the change" in said
    assert "max_length was 16, is 8" in said


def test_a_single_score_has_no_interval(recipe, tmp_path, trained, capsys, monkeypatch):
    train = runs.train_apart

    def diverging(config, worker, workers):
        if config.seed > 1:
            raise DivergedError("the loss is nan")
        return train(config, worker, workers)

    monkeypatch.setattr(runs, "train_apart", diverging)
    table = recipe.read_text().replace("[1e-4, 1e-3]", "[1e-3]").replace("seeds = 3", "seeds = 2")
    recipe.write_text(table + "ranks = [2, 4, 8]\n")
    assert main(["compare", str(recipe), "--output", str(tmp_path / "out"), "--workers", "2"]) == 0
    said = capsys.readouterr().out
    assert "seed 2: the loss is nan" in said
    assert "nan to nan" not in said
    assert "over the ranks" not in said, "of one seed there is no spread"


def test_every_problem_before_anything_is_trained(recipe, tmp_path, trained, capsys):
    recipe.write_text(recipe.read_text().replace("text.txt", "absent.txt"))
    assert main(["compare", str(recipe), "--output", str(tmp_path / "out"), "--workers", "0"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: these options cannot work (2 problems):")
    assert "workers must be at least 1; found 0" in said
    assert "absent.txt: no such file" in said
    assert not trained
    assert not (tmp_path / "out").exists()


def test_ctrl_c_keeps_what_is_over(recipe, tmp_path, trained, capsys, monkeypatch):
    made = runs.train_apart

    def train(config, worker, workers):
        if len(trained) == 3:
            raise KeyboardInterrupt
        return made(config, worker, workers)

    monkeypatch.setattr(runs, "train_apart", train)
    command = ["compare", str(recipe), "--output", str(tmp_path / "out")]
    assert main(command) == 130
    assert capsys.readouterr().err.endswith("runs are kept. The same command goes on.\n"), "and nothing more"
    monkeypatch.setattr(runs, "train_apart", made)
    assert main(command) == 0
    assert len(trained) == 10
