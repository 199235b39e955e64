import gc
import math
import statistics

import pytest
import torch

from doratune.study import race as module
from doratune.study.race import FEWEST_ROUNDS, PATIENCE, WARM_UP, Lane, Timing, median_interval, race


class Clock:
    """A clock that moves only when a lane says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.waited = 0.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(module, "seconds_kept_waiting", lambda: self.waited)

    def lane(self, name, seconds, **options):
        def run():
            self.now += seconds() if callable(seconds) else seconds

        return Lane(name, run, **options)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_ratios_are_paired_within_a_round(clock):
    rounds = []
    # The machine becomes slower all the time; both lanes feel it, and their ratio does not.
    mood = lambda: 1.0 + len(rounds)  # noqa: E731
    lanes = [
        clock.lane("floor", mood, before=rounds.append),
        clock.lane("double", lambda: 2 * mood()),
    ]
    lanes[1] = Lane("double", lanes[1].run, None)
    found = race(lanes, "floor", seconds=math.inf, rounds=20, seed=3)
    assert [timing.name for timing in found] == ["floor", "double"]
    assert found[0].ratio == found[0].low == found[0].high == 1
    assert 1.8 < found[1].ratio < 2.2
    assert found[1].rounds == 20
    assert found[1].milliseconds == pytest.approx(1e3 * 2 * statistics.median(range(4, 24)), rel=0.2)


def test_rounds_begin_with_negative_warm_up_and_every_lane_sees_each(clock):
    seen = {"a": [], "b": []}
    lanes = [clock.lane(name, 1.0, before=seen[name].append) for name in seen]
    race(lanes, "a", seconds=math.inf, rounds=7)
    assert seen["a"] == seen["b"] == list(range(-WARM_UP, 7))


def test_order_changes_between_rounds_and_is_reproducible(clock):
    def order():
        found = []
        lanes = [Lane(name, lambda name=name: found.append(name)) for name in "abc"]
        clock.now = 0.0
        lanes.append(clock.lane("tick", 1.0))
        race(lanes, "tick", rounds=30, seconds=math.inf)
        return found

    first = order()
    assert first == order()
    assert len({tuple(first[i : i + 3]) for i in range(0, len(first), 3)}) > 3


def test_time_ends_a_race_but_not_before_enough_rounds(clock):
    (found,) = race([clock.lane("a", 10.0)], "a", seconds=1.0)
    assert found.rounds == FEWEST_ROUNDS
    (found,) = race([clock.lane("a", 1.0)], "a", seconds=8.0)
    assert found.rounds == 8


def test_rounds_that_others_disturb_do_not_count(clock):
    done = []

    def seconds():
        # Every third round another process takes half of a processor.
        clock.waited += 0.01 if len(done) % 3 else 0.5
        return 1.0 if len(done) % 3 else 2.0

    lanes = [clock.lane("a", 1.0), clock.lane("b", seconds, before=done.append)]
    a, b = race(lanes, "a", seconds=1.0, rounds=100)
    assert (b.ratio, b.low, b.high) == (1, 1, 1)
    assert (b.rounds, b.left_out) == (a.rounds, a.left_out) == (6, 3)
    assert b.over(a) == (1, 1, 1)


def test_if_all_rounds_are_disturbed_the_least_disturbed_ones_count(clock):
    done = []

    def seconds():
        clock.waited += 0.1 * len(done)
        return float(len(done))

    lane = clock.lane("a", seconds, before=done.append)
    (found,) = race([lane], "a", seconds=1.0, warm_up=0)
    assert (found.rounds, found.left_out) == (FEWEST_ROUNDS, PATIENCE - FEWEST_ROUNDS)
    assert len(set(found.seconds)) == FEWEST_ROUNDS


def test_what_happens_before_is_not_timed(clock):
    def before(_):
        clock.now += 100

    (found,) = race([clock.lane("a", 1.0, before=before)], "a", rounds=6, seconds=math.inf)
    assert found.milliseconds == 1000


def test_garbage_collection_is_off_while_timed_and_on_again_after_a_failure():
    states = []
    race([Lane("a", lambda: states.append(gc.isenabled()))], "a", rounds=6, seconds=math.inf)
    assert not any(states)
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        race([Lane("a", lambda: 1 / 0)], "a")
    assert gc.isenabled()


def out_of_memory(when):
    """Raises in the rounds that ``when`` is true of."""
    numbers = []

    def run():
        if when(numbers[-1]):
            raise torch.OutOfMemoryError("CUDA out of memory")

    return {"run": run, "before": numbers.append}


@pytest.mark.parametrize("fails_in", [-1, 0, 3])
def test_a_lane_that_fails_is_out_and_the_others_race_on(fails_in, clock):
    ran, reasons = [], []
    lanes = [
        clock.lane("a", 1.0, before=ran.append),
        Lane("large", **out_of_memory(lambda number: number >= fails_in)),
        clock.lane("b", 2.0),
    ]
    found = race(lanes, "a", rounds=7, seconds=math.inf, failed=lambda *what: reasons.append(what))
    assert [(timing.name, timing.ratio, timing.rounds) for timing in found] == [("a", 1, 7), ("b", 2, 7)]
    ((name, error),) = reasons
    assert (name, type(error)) == ("large", torch.OutOfMemoryError)
    # The round in which it failed is run once more: others may have been slow to allocate anew.
    assert len(ran) == WARM_UP + 7 + (fails_in >= 0)


def test_without_its_floor_there_is_no_race(clock):
    lanes = [Lane("a", **out_of_memory(lambda number: number == 2)), clock.lane("b", 1.0)]
    assert race(lanes, "a", rounds=7, seconds=math.inf, failed=lambda *_: None) == []


def test_what_a_lane_does_after_its_run_is_not_timed(clock):
    def after():
        clock.now += 100

    (found,) = race([clock.lane("a", 1.0, after=after)], "a", rounds=6, seconds=math.inf)
    assert found.milliseconds == 1000
    assert clock.now == (WARM_UP + 6) * 101


def test_lanes_need_a_floor_and_different_names():
    for names, floor in ((["a", "b"], "c"), (["a", "a"], "a")):
        with pytest.raises(ValueError, match="different names"):
            race([Lane(name, lambda: None) for name in names], floor)


def test_interval_of_the_median():
    # The 95 % ranks for n = 10 and n = 20 as tables of the sign test have them: 2nd to 9th, 6th to 15th.
    assert median_interval(range(1, 11)) == (2, 9)
    assert median_interval(range(1, 21)) == (6, 15)
    assert median_interval([3, 1, 2]) == (1, 3)
    assert median_interval([5]) == (5, 5)


def test_progress_is_told(clock):
    told = []
    race(
        [clock.lane("a", 1.0)], "a", seconds=10.0, rounds=100, watch=lambda number, share: told.append((number, share))
    )
    assert told[0] == (0, pytest.approx(0.1))
    assert told[-1] == (9, pytest.approx(1.0))


def test_any_two_lanes_can_be_compared():
    one, other = (Timing(n, 0, 0, 0, 0, 3, times) for n, times in (("a", (2.0, 4.0, 9.0)), ("b", (1.0, 2.0, 3.0))))
    assert one.over(other) == (2, 2, 3)
    assert other.over(one) == (0.5, 1 / 3, 0.5)
