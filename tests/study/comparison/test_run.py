"""Workers and their study, with runs that are made up: who does what, what is done again, what ends it."""

import dataclasses
import threading
from collections import Counter

import optuna
import pytest

import doratune as dt
from doratune.errors import DivergedError
from doratune.study.comparison import run as module
from doratune.study.comparison import storage
from doratune.study.comparison.findings import find
from doratune.study.comparison.process import KilledError
from doratune.study.comparison.run import run_all
from doratune.study.comparison.sentences import about_replaced
from doratune.study.comparison.trials import Trial, size
from study.comparison import simulated


@pytest.fixture
def of():
    return simulated.comparison(methods=("lora 4", "dora 4"), sweep_seeds=1, seeds=2, **simulated.SWEPT)


@pytest.fixture
def trained(monkeypatch):
    """What was trained; ``trained.fail(config)`` may be replaced to let runs fail."""

    class Trained(list):
        fail = staticmethod(lambda config: None)

    runs, lock = Trained(), threading.Lock()

    def train(config, worker, workers):
        with lock:
            runs.append((config.method, config.learning_rate, config.seed))
        runs.fail(config)
        return simulated.result(accuracy=config.learning_rate)

    monkeypatch.setattr(module, "train_apart", train)
    monkeypatch.setattr(module, "POLL", 0.05)
    return runs


def opened(tmp_path, of, **more):
    return lambda: storage.open_study(storage.database(tmp_path / "study.db"), "compare", of, **more)


@pytest.mark.parametrize("workers", [1, 3])
def test_every_run_once(tmp_path, of, trained, workers):
    watched = []
    found = run_all(of, opened(tmp_path, of), tmp_path, workers, lambda *seen: watched.append(seen))
    assert len(trained) == len(set(trained)) == len(found) == size(of)
    over, count, running = watched[-1]
    assert (len(over), count, running) == (size(of), size(of), 0)
    assert run_all(of, opened(tmp_path, of), tmp_path, workers) == found
    assert len(trained) == size(of), "a complete comparison trains nothing"


def test_more_seeds_train_only_those(tmp_path, of, trained):
    run_all(of, opened(tmp_path, of), tmp_path)
    del trained[:]
    more = dataclasses.replace(of, grid=dataclasses.replace(of.grid, seeds=4))
    run_all(more, opened(tmp_path, more), tmp_path)
    assert sorted(trained) == [(method, 1e-3, seed) for method in ("dora", "lora") for seed in (3, 4)]


def with_rates(of, *rates, **more):
    return dataclasses.replace(of, grid=dataclasses.replace(of.grid, learning_rates=rates, **more))


def test_learning_rates_can_be_added(tmp_path, of, trained):
    """The simulated accuracy is the rate: a higher one is the best, and tests are done again with it."""
    run_all(of, opened(tmp_path, of), tmp_path)
    assert not find(of, run_all(of, opened(tmp_path, of), tmp_path)).replaced
    del trained[:]
    more = with_rates(of, *of.grid.learning_rates, 2e-3)
    found = find(more, run_all(more, opened(tmp_path, more), tmp_path))
    assert sorted(trained) == [(method, 2e-3, seed) for method in ("dora", "lora") for seed in (0, 1, 2)]
    assert {(one.key, rate): count for (one, rate), count in found.replaced.items()} == {
        ("lora-4", 1e-3): 2,
        ("dora-4", 1e-3): 2,
    }
    assert about_replaced(found).endswith(": 2 of LoRA rank 4 at 0.001, 2 of DoRA rank 4 at 0.001.")
    assert found.as_json()["replaced"][0] == {"contestant": "lora-4", "learning_rate": 1e-3, "runs": 2}
    assert [standing.scores.keys() for standing in found.standings] == [{1, 2}] * 2


@pytest.mark.parametrize(
    ("rates", "more"),
    [((1e-3,), {}), ((2e-3, 3e-3), {}), ((1e-4, 1e-3, 2e-3), {"learning_rates_of": {"dora": (2e-3,)}})],
)
def test_learning_rates_cannot_be_taken_away(tmp_path, of, rates, more):
    opened(tmp_path, of)()
    with pytest.raises(dt.AdapterError, match=r"is of another recipe: (?s:.*) compare.learning_rates"):
        opened(tmp_path, with_rates(of, *rates, **more))()
    opened(tmp_path, of)()


def test_one_method_alone_may_get_more_rates(tmp_path, of):
    opened(tmp_path, of)()
    opened(tmp_path, with_rates(of, *of.grid.learning_rates, learning_rates_of={"dora": (1e-4, 1e-3, 5e-3)}))()
    with pytest.raises(dt.AdapterError, match="learning_rates_of was"):
        opened(tmp_path, of)()


def test_another_recipe_is_refused_by_name(tmp_path, of, trained):
    run_all(of, opened(tmp_path, of), tmp_path)
    changed = dataclasses.replace(of, train=dataclasses.replace(of.train, steps=7))
    with pytest.raises(dt.AdapterError, match=r"is of another recipe: .*: steps was null, is 7"):
        opened(tmp_path, changed)()
    storage.open_study(storage.database(tmp_path / "study.db"), "another", changed)


def test_runs_that_diverge_are_results(tmp_path, of, trained):
    def fail(config):
        if config.learning_rate == 1e-3 and config.method == "dora":
            raise DivergedError("the loss is nan\nNo checkpoint.")

    trained.fail = fail
    found = run_all(of, opened(tmp_path, of), tmp_path)
    assert [(o.trial.contestant, o.problem) for o in found if o.problem] == [("dora-4", "the loss is nan")]
    tests = {o.trial.learning_rate for o in found if o.trial.stage == "test" and o.trial.contestant == "dora-4"}
    assert tests == {1e-4}
    assert len(trained) == size(of), "none is tried again"


def test_a_score_that_is_no_number_is_a_result_too(tmp_path, of, trained, monkeypatch):
    train = module.train_apart

    def broken(config, worker, workers):
        result = train(config, worker, workers)
        return dataclasses.replace(result, test_accuracy=float("nan")) if config.method == "dora" else result

    monkeypatch.setattr(module, "train_apart", broken)
    found = run_all(of, opened(tmp_path, of), tmp_path)
    assert len(trained) == size(of), "none is tried again"
    told = {(o.trial.contestant, o.problem) for o in found if o.trial.stage == "test"}
    assert told == {("lora-4", None), ("dora-4", "the score is nan")}


def test_studies_of_one_output_keep_out_of_each_others_way(tmp_path, of, trained):
    other = tmp_path / "runs" / "another" / "0-lora-4"
    other.mkdir(parents=True)
    run_all(of, opened(tmp_path, of), tmp_path)
    assert other.is_dir()
    assert not (tmp_path / "runs" / "compare").exists()


def test_a_killed_run_is_done_again_but_not_for_ever(tmp_path, of, trained):
    attempts = Counter()

    def fail(config):
        key = (config.method, config.seed)
        attempts[key] += 1
        if key == ("dora", 1) and attempts[key] < 3:
            raise KilledError

    trained.fail = fail
    assert len(run_all(of, opened(tmp_path, of), tmp_path)) == size(of)
    assert attempts["dora", 1] == 3

    def always(config):
        raise KilledError

    trained.fail = always
    again = dataclasses.replace(of, grid=dataclasses.replace(of.grid, seeds=3))
    with pytest.raises(dt.AdapterError, match="was killed 3 times"):
        run_all(again, opened(tmp_path, again), tmp_path)


@pytest.mark.parametrize("error", [dt.AdapterError("no room on the disk"), KeyboardInterrupt(), RuntimeError("a bug")])
def test_other_errors_end_it_and_the_same_command_goes_on(tmp_path, of, trained, error):
    def fail(config):
        if len(trained) == 3:
            raise error

    trained.fail = fail
    with pytest.raises(type(error)):
        run_all(of, opened(tmp_path, of), tmp_path)
    assert len(trained) == 3
    assert len(run_all(of, opened(tmp_path, of), tmp_path)) == size(of)
    assert len(trained) == 1 + size(of)


def test_data_that_change_meanwhile_end_it(tmp_path, of, trained):
    data = tmp_path / "d.jsonl"
    data.write_text("one")
    of = dataclasses.replace(of, train=dataclasses.replace(of.train, data=(str(data),)))

    def fail(config):
        if len(trained) == 3:
            data.write_text("two")

    trained.fail = fail
    with pytest.raises(dt.AdapterError, match=r"data changed while .*: content of .*d\.jsonl was .*, is "):
        run_all(of, opened(tmp_path, of), tmp_path)
    assert len(trained) == 3
    data.write_text("one")
    assert len(run_all(of, opened(tmp_path, of), tmp_path)) == size(of)
    assert len(trained) == 1 + size(of), "the run that read other data is done again"


def test_a_run_that_two_workers_added_is_done_once(tmp_path, of, trained):
    study = opened(tmp_path, of)()
    trial = Trial("sweep", "lora-4", 1e-3, 0)
    storage.add(study, of, [trial])
    twin = study.get_trials()[0]
    study.add_trial(twin)
    assert len(study.get_trials()) == 2
    assert len(run_all(of, opened(tmp_path, of), tmp_path)) == size(of)
    assert len(trained) == len(set(trained)) == size(of)


def test_a_run_whose_worker_shows_no_life_is_taken_over(tmp_path, of, trained):
    make = opened(tmp_path, of, heartbeat=1, grace=2)
    study = make()
    storage.add(study, of, [Trial("sweep", "lora-4", 1e-3, 0)])
    with pytest.warns(UserWarning, match="Heartbeat"):
        abandoned = study.ask()
    study._storage.record_heartbeat(abandoned._trial_id)  # what a worker does while it lives
    assert len(run_all(of, make, tmp_path)) == size(of)
    assert study.get_trials()[abandoned.number].state == optuna.trial.TrialState.FAIL
    assert len(trained) == len(set(trained)) == size(of)


def test_a_worker_that_slept_too_long_goes_on_with_the_next(tmp_path, of, trained):
    study = opened(tmp_path, of)()

    def fail(config):
        if len(trained) == 2:  # as another worker does that has seen no sign of life
            states = optuna.trial.TrialState
            [mine] = study.get_trials(states=(states.RUNNING,))
            study._storage.set_trial_state_values(mine._trial_id, states.FAIL)

    trained.fail = fail
    assert len(run_all(of, opened(tmp_path, of), tmp_path)) == size(of)
    assert len(trained) == 1 + size(of)


def test_a_storage_that_cannot_be_used(tmp_path, of, monkeypatch):
    monkeypatch.setattr(storage, "TRIES", 1)
    with pytest.raises(dt.AdapterError, match=r"storage sqlite:///.*absent.* cannot be used"):
        storage.open_study(storage.database(tmp_path / "absent" / "study.db"), "compare", of)


def test_passwords_are_not_told(of, monkeypatch):
    monkeypatch.setattr(storage, "TRIES", 1)
    with pytest.raises(dt.AdapterError, match=r"storage nosuch://me:\*\*\*@host/x cannot be used") as caught:
        storage.open_study("nosuch://me:secret@host/x", "compare", of)
    assert "secret" not in str(caught.value)
