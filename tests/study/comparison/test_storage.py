"""The study's storage, with nothing but made-up runs in it."""

import contextlib
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import optuna
import psutil
import pytest
import sqlalchemy

import doratune as dt
from doratune.study.comparison import storage
from study.comparison import simulated


def test_a_run_is_handed_out_once_however_close_two_workers_come(tmp_path, monkeypatch):
    of = simulated.comparison(methods=("lora 4", "dora 4"))
    url = storage.database(tmp_path / "study.db")
    workers = [storage.open_study(url, "compare", of) for _ in range(2)]
    storage.add(workers[0], of, [storage.Trial("test", "dora-4", 1e-3, 0)])
    [waiting] = workers[0].get_trials()
    both_have_read = threading.Barrier(2)
    original = optuna.storages.RDBStorage.check_trial_is_updatable

    def between_reading_and_writing(self, *arguments):
        original(self, *arguments)
        # Or else the other one waits for this one's transaction to end, as it should.
        with contextlib.suppress(threading.BrokenBarrierError):
            both_have_read.wait(1.0)

    monkeypatch.setattr(optuna.storages.RDBStorage, "check_trial_is_updatable", between_reading_and_writing)

    def take(study):
        return study._storage.set_trial_state_values(waiting._trial_id, optuna.trial.TrialState.RUNNING)

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(take, workers)) == [False, True]


def test_a_run_whose_worker_was_killed_before_its_first_sign_of_life_is_lost(tmp_path):
    of = simulated.comparison(methods=("lora 4", "dora 4"))
    url = storage.database(tmp_path / "study.db")
    study = storage.open_study(url, "compare", of, heartbeat=1, grace=1)
    storage.add(study, of, [storage.Trial("test", key, 1e-3, 0) for key in ("lora-4", "dora-4")])
    taken, alive = study.get_trials()
    for one in (taken, alive):
        assert study._storage.set_trial_state_values(one._trial_id, optuna.trial.TrialState.RUNNING)
    watched, until = set(), time.monotonic() + 30
    while (states := [one.state for one in study.get_trials()])[taken.number] == optuna.trial.TrialState.RUNNING:
        assert time.monotonic() < until, "it is waited for, for ever"
        study._storage.record_heartbeat(alive._trial_id)
        storage.fail_lost(study, watched)
        time.sleep(0.1)
    assert states[taken.number] == optuna.trial.TrialState.FAIL
    assert states[alive.number] == optuna.trial.TrialState.RUNNING


@pytest.mark.parametrize("name", ["what?", "100%20", "a#b", "méin study"])
def test_the_study_lies_in_the_named_folder_whatever_its_name(tmp_path, name):
    file = tmp_path / name / "study.db"
    file.parent.mkdir()
    if "?" in name and sqlalchemy.__version__.startswith("2.0"):  # that of Python 3.10
        with pytest.raises(dt.AdapterError, match=re.escape(f"{file}: a study cannot lie in")):
            storage.database(file)
    else:
        storage.open_study(storage.database(file), "compare", simulated.comparison())
        assert file.is_file()


def test_few_runs_wait_at_a_time(tmp_path):
    # Optuna reads each run that is not over whenever the study is looked at: hundreds would cost more than training.
    of = simulated.comparison(methods=("lora 4", "dora 4"))
    study = storage.open_study(storage.database(tmp_path / "study.db"), "compare", of)
    wanted = [storage.Trial("test", "lora-4", 1e-3, seed) for seed in range(3 * storage.AHEAD)]
    running = optuna.trial.TrialState.RUNNING
    for taken in range(2):
        storage.add(study, of, wanted)
        storage.add(study, of, wanted)
        there = study.get_trials()
        assert [one.params["seed"] for one in there] == list(range(storage.AHEAD + taken))
        study._storage.set_trial_state_values(there[taken]._trial_id, running)


def test_a_recipe_that_failed_before_any_run_was_over_may_be_corrected(tmp_path):
    url, states = storage.database(tmp_path / "study.db"), optuna.trial.TrialState
    wrong = simulated.comparison(methods=("lora 4", "dora 4"))
    right = simulated.comparison(methods=("lora 4", "full"))
    study = storage.open_study(url, "compare", wrong)
    storage.add(study, wrong, [storage.Trial("test", key, 1e-3, 0) for key in ("lora-4", "dora-4")])
    failed, running = study.get_trials()
    for state in (states.RUNNING, states.FAIL):
        study._storage.set_trial_state_values(failed._trial_id, state)
    study._storage.set_trial_state_values(running._trial_id, states.RUNNING)
    with pytest.raises(dt.AdapterError, match="is of another recipe"):
        storage.open_study(url, "compare", right)  # another worker is at it
    study._storage.set_trial_state_values(running._trial_id, states.FAIL)
    study = storage.open_study(url, "compare", right)
    storage.add(study, right, [storage.Trial("test", key, 1e-3, 0) for key in ("lora-4", "full")])
    assert [one.params["contestant"] for one in study.get_trials()] == ["lora-4", "full"]


def test_no_connection_stays_open(tmp_path):
    study = storage.open_study(storage.database(tmp_path / "study.db"), "compare", simulated.comparison())
    assert study.get_trials() == []
    assert [file.path for file in psutil.Process().open_files() if file.path.startswith(str(tmp_path))] == []
