"""A run that is killed goes on from its last whole checkpoint and ends as if nothing had happened, bit for bit."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from doratune.train import AdapterOptions, TrainConfig, train
from doratune.train.checkpoints import last_checkpoint
from doratune.train.results import read_metrics
from train.tiny import save_model, write_text


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    save_model(folder / "model", layers=1)
    write_text(folder / "text.txt")
    train(config(folder, folder / "run"), Console(quiet=True))
    return folder


def config(folder, output, **values):
    options = {"max_length": 16, "steps": 6, "batch_size": 2, "learning_rate": 1e-2, "log_every": 1, "save_every": 2}
    adapter = AdapterOptions(rank=4, dropout=0.1)
    data = (str(folder / "text.txt"),)
    return TrainConfig(str(folder / "model"), data, output, adapter=adapter, **{**options, **values})


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def before_any_checkpoint(monkeypatch):
    monkeypatch.setattr("doratune.train.checkpoints.mark_complete", lambda *_: die())
    monkeypatch.setattr("doratune.train.trainer.save_adapter", lambda *_: die())


def while_a_checkpoint_is_written(monkeypatch):
    original, calls = torch.save, []

    def cut_short(value, path, *args, **kwargs):
        calls.append(path)
        original(value, path, *args, **kwargs)
        if "checkpoint-4" in str(path) and str(path).endswith("optimizer.pt"):
            os.truncate(path, 100)
            die()

    monkeypatch.setattr(torch, "save", cut_short)


def before_the_marker_of_the_second(monkeypatch):
    import doratune.train.trainer as module

    original = module.mark_complete
    monkeypatch.setattr(module, "mark_complete", lambda f: die() if "checkpoint-4" in str(f) else original(f))


def while_an_old_checkpoint_is_deleted(monkeypatch):
    original = shutil.rmtree

    def cut_short(path, *args, **kwargs):
        if str(path).endswith("checkpoint-2"):
            (Path(path) / "optimizer.pt").unlink()
            die()
        original(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", cut_short)


def while_the_adapter_is_written(monkeypatch):
    monkeypatch.setattr("doratune.train.run.save_adapter", lambda *_: die())


def while_the_results_are_written(monkeypatch):
    monkeypatch.setattr("doratune.train.results.write_whole", lambda *_: die())


MOMENTS = {
    before_any_checkpoint: None,
    while_a_checkpoint_is_written: 2,
    before_the_marker_of_the_second: 2,
    while_an_old_checkpoint_is_deleted: 4,
    while_the_adapter_is_written: 6,
    while_the_results_are_written: 6,
}


def started(folder, output, before=lambda: None, **values):
    """A run in a process of its own, without importing everything again."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            before()
            train(config(folder, output, **values), Console(quiet=True))
            code = 0
        finally:
            os._exit(code)
    return child


def same(folder, output):
    """Whether two runs have left the same adapter and measured the same."""
    one, other = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (folder, output))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    metrics = [
        [(r["step"], r.get("loss"), r.get("eval_loss")) for r in read_metrics(run / "metrics.jsonl")]
        for run in (folder, output)
    ]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.__name__)
def test_killed_and_resumed(whole, tmp_path, moment, monkeypatch):
    keep = 1 if moment is while_an_old_checkpoint_is_deleted else 2
    child = started(whole, tmp_path / "run", lambda: moment(monkeypatch), keep=keep)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, "the run was to be killed"
    last = last_checkpoint(tmp_path / "run" / "checkpoints")
    assert (last and int(last.name.rpartition("-")[2])) == MOMENTS[moment]
    result = train(config(whole, tmp_path / "run", keep=keep, resume=True), Console(quiet=True))
    assert result.steps == 6
    same(whole / "run", tmp_path / "run")


def test_killed_at_six_random_moments_of_one_run(tmp_path):
    """Each time the run goes on from where it was killed; where it has ended meanwhile, another begins."""
    options = {"steps": 12, "keep": 1, "save_every": 1, "eval_every": 4}
    save_model(tmp_path / "model", layers=1)
    write_text(tmp_path / "text.txt")
    start = time.monotonic()
    train(config(tmp_path, tmp_path / "whole", **options), Console(quiet=True))
    took = time.monotonic() - start
    choose, killed, run = random.Random(0), 0, 0
    while killed < 6:
        output = tmp_path / f"run-{run}"
        child = started(tmp_path, output, resume=(output / "recipe.toml").is_file(), **options)
        time.sleep(choose.uniform(0.1, 0.9) * took)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0, "it was not killed, and failed"
            same(tmp_path / "whole", output)
            run += 1
    output = tmp_path / f"run-{run}"
    train(config(tmp_path, output, resume=(output / "recipe.toml").is_file(), **options), Console(quiet=True))
    same(tmp_path / "whole", output)
