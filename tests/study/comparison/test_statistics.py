import math

import numpy as np
import pytest

from doratune.study.comparison.findings import find
from doratune.study.comparison.statistics import detectable, difference, mean_interval, of_each
from study.comparison import simulated


def standardised(count):
    values = np.random.default_rng(0).normal(size=count)
    return (values - values.mean()) / values.std(ddof=1)


def test_intervals_are_those_of_scipy():
    from scipy.stats import ttest_1samp, ttest_rel

    other, base = np.random.default_rng(1).normal(size=(2, 7))
    own, theirs = mean_interval(other, 0.9), ttest_1samp(other, 0).confidence_interval(0.9)
    assert (own.low, own.high) == pytest.approx((theirs.low, theirs.high))
    own, theirs = difference(other - base, 0.95), ttest_rel(other, base).confidence_interval(0.95)
    assert (own.low, own.high) == pytest.approx((theirs.low, theirs.high))
    several, theirs = difference(other - base, of_each(0.95, 5)), ttest_rel(other, base).confidence_interval(0.99)
    assert (several.low, several.high) == pytest.approx((theirs.low, theirs.high))


@pytest.mark.parametrize(("count", "effect"), [(5, 1.6820), (10, 0.9960), (20, 0.6604), (34, 0.4951)])
def test_what_can_be_seen_is_what_tables_say(count, effect):
    # Effect sizes that G*Power and R's power.t.test(type = "one.sample") give for 80 % power at 5 %, two-sided.
    assert detectable(standardised(count), 0.95) == pytest.approx(effect, abs=1e-3)
    assert detectable(3 * standardised(count), 0.95) == pytest.approx(3 * effect, abs=3e-3)


def test_too_few_or_equal_values():
    lonely = difference([1.0], 0.95)
    assert lonely.mean == 1
    assert all(math.isnan(value) for value in (lonely.low, lonely.high, lonely.detectable))
    assert not lonely.is_found
    same = difference([0.0, 0.0], 0.95)
    assert (same.low, same.high, same.detectable, same.is_found) == (0, 0, 0, False)
    assert not difference([1.0, 1.0], 0.95).is_found, "two equal differences say nothing of a third"


REPETITIONS = 300


def found_in(shift, methods=("lora 4", "dora 4"), seeds=10):
    """Share of simulated studies that find any difference, when all methods but the first are better by ``shift``.

    Seeds have an effect that pairs share (2 points), besides each run's own noise (1 point).
    """
    of = simulated.comparison(methods=methods, seeds=seeds)
    random, found = np.random.default_rng(2), 0
    for _ in range(REPETITIONS):
        shared = {seed: random.normal(0.7, 0.02) for seed in range(100)}

        def score(trial, shared=shared):
            better = shift if trial.contestant != of.contestants[0].key else 0.0
            return shared[trial.seed] + better + random.normal(0, 0.01), 1.0

        found += any(gap.difference.is_found for gap in find(of, simulated.outcomes(of, score)).gaps)
    return found / REPETITIONS


def bounds(share):
    """Where a share of the repetitions lies but once in a thousand times."""
    from scipy.stats import binom

    return [end / REPETITIONS for end in binom.interval(0.999, REPETITIONS, share)]


def test_identical_methods_differ_as_often_as_the_confidence_says():
    low, high = bounds(0.05)
    assert low <= found_in(0.0) <= high


def test_of_several_identical_methods_any_differs_no_more_often():
    _, high = bounds(0.05)
    assert found_in(0.0, ("lora 4", "dora 4", "dora 2", "dora 1", "lora 2")) <= high


def test_a_planted_difference_is_found_as_often_as_promised():
    # What ten pairs can see, of runs that differ by a standard deviation of sqrt(2) points within a pair.
    low, high = bounds(0.8)
    assert low <= found_in(0.01 * math.sqrt(2) * 0.9960) <= high
