"""A run that keeps its best measurement: what is written, reported, and gone on with."""

import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import doratune as dt
from doratune.train import AdapterOptions, TrainConfig, train
from doratune.train.checkpoints import checkpoints
from doratune.train.results import read_metrics
from train.tiny import llama, save_model, write_text


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """A model, a text, and another to measure on, which the first one does not teach."""
    folder = tmp_path_factory.mktemp("assets")
    (folder / "other.txt").write_text("zq qz zzq\n" * 60)
    return save_model(folder / "model"), write_text(folder / "text.txt"), folder / "other.txt"


def config(assets, output, **values):
    options = {
        "max_length": 16,
        "steps": 14,
        "batch_size": 2,
        "learning_rate": 0.1,
        "schedule": "constant",
        "eval_every": 4,
        "keep_best": True,
        "eval_data": (str(assets[2]),),
        "adapter": AdapterOptions(rank=4),
    }
    return TrainConfig(model=str(assets[0]), data=(str(assets[1]),), output=output, **{**options, **values})


def measured(folder):
    return {r["step"]: r["eval_loss"] for r in read_metrics(folder / "metrics.jsonl") if "eval_loss" in r and r["step"]}


@pytest.mark.parametrize("method", ["dora", "full"])
def test_the_best_measurement_is_kept(assets, tmp_path, method):
    result = train(config(assets, tmp_path / "run", method=method), Console(quiet=True))
    losses = measured(tmp_path / "run")
    assert list(losses) == [4, 8, 12, 14]
    best = min(losses, key=losses.get)
    assert best != 14, "if the last one is the best this shows nothing"
    assert (result.best_step, result.steps) == (best, 14)
    assert result.loss_after == losses[best]
    assert f"kept from step {best}" in dict(result.rows())["held-out loss"]
    assert tmp_path / "run" / "checkpoints" / f"checkpoint-{best}" in checkpoints(tmp_path / "run" / "checkpoints")
    name = "adapter_model.safetensors" if method == "dora" else "model.safetensors"
    kept = load_file(tmp_path / "run" / "checkpoints" / f"checkpoint-{best}" / name)
    written = load_file(tmp_path / "run" / ("adapter" if method == "dora" else "model") / name)
    assert all(torch.equal(kept[key], written[key]) for key in written)
    if method == "dora":
        dt.load_adapter(llama(), tmp_path / "run" / "adapter")


def test_patience_ends_the_run(assets, tmp_path, capsys):
    result = train(config(assets, tmp_path / "run", eval_every=1, patience=2, steps=30), Console(width=200))
    losses = measured(tmp_path / "run")
    assert result.best_step == min(losses, key=losses.get)
    assert result.steps == result.best_step + 2 < 30
    assert max(losses) == result.steps
    assert f"ended at step {result.steps} of 30: no lower held-out loss in 2" in capsys.readouterr().out


def test_resumed_it_still_knows_the_best(assets, tmp_path):
    whole = train(config(assets, tmp_path / "whole", keep=9), Console(quiet=True))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (12, 14):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"checkpoint-{step}")
    (tmp_path / "cut" / "results.json").unlink()
    again = train(config(assets, tmp_path / "cut", keep=9, resume=True), Console(quiet=True))
    assert (again.best_step, again.loss_after) == (whole.best_step, whole.loss_after)
    with pytest.raises(dt.AdapterError, match=r"eval_data was .*other.txt.* losses on other data cannot tell"):
        train(config(assets, tmp_path / "cut", eval_data=(str(assets[1]),), steps=20, resume=True), Console(quiet=True))


def test_what_it_needs(assets, tmp_path):
    with pytest.raises(dt.AdapterError) as refused:
        train(config(assets, tmp_path / "run", eval_every=None, patience=0))
    assert any("give eval_every" in line for line in refused.value.problems)
    assert any("patience must be above 0" in line for line in refused.value.problems)
    with pytest.raises(dt.AdapterError, match="patience stops a run behind its best measurement"):
        train(config(assets, tmp_path / "run", keep_best=False, patience=1))


def cut_back(folder, step):
    """The run as it was when it was killed after the checkpoint of a step."""
    for path in checkpoints(folder / "checkpoints"):
        if int(path.name.partition("-")[2]) > step:
            shutil.rmtree(path)
    (folder / "results.json").unlink()


def test_patience_outlives_a_kill(assets, tmp_path):
    options = {"eval_every": 1, "patience": 3, "steps": 30, "keep": 9}
    whole = train(config(assets, tmp_path / "run", **options), Console(quiet=True))
    cut_back(tmp_path / "run", whole.best_step + 2)
    again = train(config(assets, tmp_path / "run", **options, resume=True), Console(quiet=True))
    assert (again.best_step, again.steps) == (whole.best_step, whole.steps)
    with pytest.raises(dt.AdapterError, match=r"patience ended the run .*; ask for more patience"):
        train(config(assets, tmp_path / "run", **options, resume=True), Console(quiet=True))
    more = train(config(assets, tmp_path / "run", **{**options, "patience": 4}, resume=True), Console(quiet=True))
    assert more.steps > whole.steps


def test_a_best_step_without_a_checkpoint_is_not_said_to_be_kept(assets, tmp_path, capsys):
    first = train(config(assets, tmp_path / "run", keep=9), Console(quiet=True))
    cut_back(tmp_path / "run", 12)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"checkpoint-{first.best_step}")
    again = train(config(assets, tmp_path / "run", keep=9, resume=True), Console(width=200))
    assert f"step {first.best_step}, the best so far, has no checkpoint any more" in capsys.readouterr().out
    assert again.best_step == 14
    assert again.loss_after == measured(tmp_path / "run")[14]


def test_without_it_the_best_is_neither_noted_nor_kept(assets, tmp_path):
    options = {"keep_best": False, "save_every": 4, "keep": 1}
    train(config(assets, tmp_path / "run", **options), Console(quiet=True))
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["checkpoint-14"]
    (tmp_path / "run" / "results.json").unlink()
    options = {"keep_best": True, "steps": 20, "resume": True}
    again = train(config(assets, tmp_path / "run", **options), Console(quiet=True))
    assert again.best_step > 14
    train(config(assets, tmp_path / "run", keep_best=False, keep=1, steps=22, resume=True), Console(quiet=True))
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["checkpoint-22"]
