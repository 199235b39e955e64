"""The study's storage, with nothing but made-up runs in it."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import optuna

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
