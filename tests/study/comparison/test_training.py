"""Comparisons that are trained: tiny models, real processes."""

import dataclasses
import gc
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import resource_tracker

import optuna
import psutil
import pytest
import torch

import doratune as dt
from doratune.errors import DivergedError
from doratune.study.comparison import process, recipe, storage
from doratune.study.comparison.findings import find
from doratune.study.comparison.run import run_all
from doratune.study.comparison.trials import grid, size
from study.comparison.workers import opened, work
from train.tiny import save_model, write_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("task")
    save_model(made / "model")
    write_text(made / "text.txt", 400)
    return made


def write(folder, name, compare, **values):
    options = {"steps": 10, "max_length": 16, "rank": 2, "alpha": 4, "test_fraction": 0.2, **values}
    lines = [f'model = "{folder}/model"', f'data = ["{folder}/text.txt"]']
    lines += [f"{key} = {value}" for key, value in options.items()]
    path = folder / f"{name}.toml"
    path.write_text("\n".join([*lines, "[compare]", compare]) + "\n")
    return str(path)


def test_two_workers_one_of_them_killed(folder, tmp_path):
    name = write(folder, "kill", 'methods = ["lora r", "dora r"]\nlearning_rates = [1e-3]\nseeds = 2')
    of = recipe.load(name)
    study = opened(tmp_path, of)
    storage.add(study, of, grid(of, []))  # or both might, at the same moment
    resource_tracker.ensure_running()  # which a worker that is started anew would begin, and lives as long as the tests
    before = set(psutil.Process().children(recursive=True))
    victim, other = (process._context().Process(target=work, args=(name, tmp_path)) for _ in range(2))
    victim.start(), other.start()
    mine = _run_of(study, victim, tmp_path)
    begun = set(psutil.Process(victim.pid).parent().children(recursive=True)) - before
    begun = {one for one in begun if one.exe() == psutil.Process().exe()}  # no browser of another test
    assert len(begun) >= 3, "two workers, and what the victim is training"
    victim.kill()
    other.join(240)
    assert other.exitcode == 0
    states = optuna.trial.TrialState
    found = study.get_trials()
    assert found[mine].state == states.FAIL, "what the killed worker was doing"
    over = [storage.trial_of(one.params) for one in found if one.state == states.COMPLETE]
    assert len(over) == len(set(over)) == size(of) == 4, "every run once"
    assert len(found) == 5, "one run was lost, and nothing else"
    assert storage.trial_of(found[mine].params) in over
    assert all(len(one.scores) == 2 for one in find(of, storage.outcomes(study)).standings)
    assert psutil.wait_procs(begun, timeout=60)[1] == [], "what the killed worker was training lives on"


def _run_of(study, worker, folder):
    """Number of a run that this worker is in the middle of."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        for one in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            if f" {worker.pid}." in one.user_attrs.get("worker", "") and [*folder.glob(f"runs/*/{one.number}-*")]:
                return one.number
        time.sleep(0.05)
    raise AssertionError("the worker has begun nothing")


def test_a_planted_difference_is_found_and_costs_are_told(folder, tmp_path):
    compare = 'methods = ["lora r", "dora r"]\nlearning_rates = [1e-2]\nlearning_rates_of = {dora = [1e-9]}\nseeds = 3'
    of = recipe.load(write(folder, "planted", compare))
    findings = find(of, run_all(of, lambda: opened(tmp_path, of), tmp_path, workers=2))
    [gap] = findings.gaps
    assert gap.difference.is_found
    assert gap.difference.low > 0, "its loss is higher"
    lora, dora = findings.standings
    assert dora.score.mean == pytest.approx(5.55, abs=0.1), "it has learnt nothing"
    assert (lora.sizes["direction"], lora.sizes["magnitude"]) == (dora.sizes["direction"], 0)
    assert dora.sizes["magnitude"] > 0
    assert findings.test_examples > 10
    assert 2**26 < lora.peak_memory < 2**32
    assert list(tmp_path.iterdir()) == [tmp_path / "study.db"], "nothing of the runs is left"


def config(folder, output):
    of = recipe.load(write(folder, "one", ""))
    return dataclasses.replace(of.config(of.contestants[1], 1e-2, 3, output), steps=2)


def test_a_run_apart_is_the_same_run(folder, tmp_path):
    apart = process.train_apart(config(folder, tmp_path / "apart"))
    here = dt.train.train(config(folder, tmp_path / "here"))
    same = ("loss_before", "loss_after", "test_loss", "test_examples", "seed", "rank", "trained")
    assert {name: getattr(apart, name) for name in same} == {name: getattr(here, name) for name in same}
    assert not (tmp_path / "apart").exists()


@pytest.mark.skipif(torch.version.cuda is not None, reason="with CUDA no server forks the runs")
def test_what_the_server_has_imported_no_run_collects():
    with ProcessPoolExecutor(1, mp_context=process._context()) as pool:
        assert pool.submit(gc.get_freeze_count).result() > 100_000


def test_errors_of_a_run_apart_are_told(folder, tmp_path):
    with pytest.raises(dt.AdapterError, match="no such folder"):
        process.train_apart(dataclasses.replace(config(folder, tmp_path / "run"), model="/absent"))
    broken = dataclasses.replace(config(folder, tmp_path / "run"), learning_rate=1e30, steps=20, log_every=1)
    with pytest.raises(DivergedError, match="training cannot recover"):
        process.train_apart(broken)


@pytest.mark.parametrize(
    ("visible", "count", "worker", "expected"),
    [
        (None, 0, 0, None),
        (None, 1, 3, None),
        (None, 4, 1, "1"),
        (None, 2, 3, "1"),
        ("4, 6", 2, 1, "6"),
        ("0,1,7", 2, 2, "0"),  # there is no 7
        ("", 0, 0, None),
    ],
)
def test_each_worker_has_a_gpu(visible, count, worker, expected):
    assert process.visible_gpu(visible, lambda: count, worker) == expected


def test_parts_of_a_gpu_are_shared_without_a_look_at_them():
    def look():
        raise AssertionError("CUDA was asked")

    assert process.visible_gpu("MIG-a,MIG-b", look, 3) == "MIG-b"
