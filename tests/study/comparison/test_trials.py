import pytest

from doratune.study.comparison.trials import Chosen, Trial, choose, grid, scoring, size, sweep
from study.comparison import simulated


def of(**values):
    return simulated.comparison(methods=("lora 4", "dora 4"), sweep_seeds=2, seeds=3, **{**simulated.SWEPT, **values})


def test_first_the_sweep_then_the_tests_with_other_seeds():
    wanted = grid(of(), [])
    assert wanted == sweep(of())
    assert len(set(wanted)) == len(wanted) == 2 * 2 * 2
    assert {(t.stage, t.seed) for t in wanted} == {("sweep", 0), ("sweep", 1)}
    done = simulated.outcomes(of(), lambda t: (t.learning_rate, 1.0))
    whole = grid(of(), done)
    assert len(set(whole)) == len(whole) == size(of()) == 8 + 6
    assert {t.seed for t in whole if t.stage == "test"} == {2, 3, 4}
    assert {o.trial for o in done} == set(whole)
    more = grid(of(), done[:-1])
    assert more == whole, "a missing test changes nothing of what is wanted"
    assert grid(of(), done[1:8]) == sweep(of()), "a missing run of the sweep: no rate is chosen yet"


def test_more_seeds_only_add():
    before = grid(of(), simulated.outcomes(of(), lambda t: (0.5, 1.0)))
    more = simulated.comparison(methods=("lora 4", "dora 4"), sweep_seeds=2, seeds=5, **simulated.SWEPT)
    after = grid(more, simulated.outcomes(more, lambda t: (0.5, 1.0)))
    assert set(before) < set(after)
    assert len(after) == len(before) + 4


def test_each_method_has_its_own_rate_and_the_end_is_marked():
    three = of(learning_rates=(1e-4, 1e-3, 1e-2))
    best = {"lora-4": 1e-3, "dora-4": 1e-2}
    done = simulated.outcomes(three, lambda t: (0.9 if t.learning_rate == best[t.contestant] else 0.5, 1.0))
    assert choose(three, done) == {"lora-4": Chosen(1e-3, ""), "dora-4": Chosen(1e-2, "highest")}


def test_the_lower_loss_decides_between_equal_accuracies_then_the_lower_rate():
    assert choose(of(), simulated.outcomes(of(), lambda t: (0.5, t.learning_rate)))["dora-4"].learning_rate == 1e-4
    assert choose(of(), simulated.outcomes(of(), lambda t: (0.5, -t.learning_rate)))["dora-4"].learning_rate == 1e-3
    assert choose(of(), simulated.outcomes(of(), lambda t: (0.5, 1.0)))["dora-4"].learning_rate == 1e-4


def test_loss_decides_for_text():
    text = of(task="text-generation")
    done = simulated.outcomes(text, lambda t: (None, t.learning_rate))
    assert choose(text, done)["dora-4"] == Chosen(1e-4, "lowest")


def test_a_rate_that_diverged_once_is_out():
    def score(trial):
        gone = trial.learning_rate == 1e-3 and trial.seed == 1
        return None if gone else (trial.learning_rate, 1.0)

    assert choose(of(), simulated.outcomes(of(), score))["lora-4"].learning_rate == 1e-4


def test_a_method_that_always_diverges_has_no_tests():
    done = simulated.outcomes(of(), lambda t: None if t.contestant == "dora-4" and t.stage == "sweep" else (0.5, 1.0))
    assert set(choose(of(), done)) == {"lora-4"}
    assert {t.contestant for t in grid(of(), done) if t.stage == "test"} == {"lora-4"}


def test_a_single_rate_needs_no_sweep():
    fixed = of(**simulated.FIXED)
    assert sweep(fixed) == []
    assert scoring(fixed, choose(fixed, []))[0] == Trial("test", "lora-4", 1e-3, 2)


@pytest.mark.parametrize("stage", ["sweep", "test"])
def test_scores_are_of_the_data_of_the_stage(stage):
    import dataclasses

    from doratune.study.comparison.trials import Outcome

    made = dataclasses.asdict(simulated.result(test_accuracy=0.25, test_loss=3.0))
    outcome = Outcome(Trial(stage, "dora-4", 1e-3, 0), made)
    expected = {"sweep": (50.0, 1.0), "test": (25.0, 3.0)}[stage]
    assert (outcome.score(True), outcome.score(False)) == expected
