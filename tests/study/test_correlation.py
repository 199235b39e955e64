import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from doratune.study.correlation import FEWEST_LAYERS, correlate, within_groups

NUMBERS = st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.integers(0, 5)), min_size=3, max_size=40)


@given(NUMBERS)
def test_value_line_and_interval_against_numpy(points):
    x, y, layers = zip(*points, strict=True)
    found = correlate(x, y, layers)
    assert (found.points, found.layers) == (len(points), len(set(layers)))
    if np.ptp(x) < 1e-6 or np.ptp(y) < 1e-6:
        return
    assert found.value == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
    slope, intercept = np.polyfit(x, y, 1)
    assert found.slope == pytest.approx(slope, rel=1e-5, abs=1e-5)
    assert found.intercept == pytest.approx(intercept, rel=1e-5, abs=1e-3)
    if found.low is not None:
        assert -1 <= found.low <= found.high <= 1


@given(NUMBERS, st.floats(0.1, 100), st.floats(-10, 10))
def test_units_do_not_matter_and_a_sign_turns_it_round(points, scale, shift):
    x, y, layers = zip(*points, strict=True)
    if np.ptp(x) < 1e-3 or np.ptp(y) < 1e-3:
        return
    one = correlate(x, y, layers)
    other = correlate([scale * v + shift for v in x], y, layers)
    assert other.value == pytest.approx(one.value, abs=1e-6)
    negative = correlate([-v for v in x], y, layers)
    assert negative.value == pytest.approx(-one.value, abs=1e-6)


def test_perfect_lines_have_no_width():
    x = np.arange(12.0)
    rising = correlate(x, 3 * x + 1, np.arange(12) // 2)
    assert (rising.value, rising.slope, rising.intercept) == pytest.approx((1, 3, 1))
    assert (rising.low, rising.high, rising.sign) == (pytest.approx(1), pytest.approx(1), "positive")
    assert correlate(x, -x, np.arange(12) // 2).sign == "negative"


def test_what_cannot_be_said_is_not():
    assert correlate([1, 1, 1], [1, 2, 3], "abc").value is None
    assert correlate([1, 2], [1, 2], "ab").sign == "not defined"
    assert correlate([1, 2, 3], [0.125, 0.125 + 1e-16, 0.125 + 3e-16], "abc").value is None, "rounding"
    few = correlate([1, 2, 3, 4], [1, 2, 3, 5], [0, 0, 1, 2])
    assert few.value > 0.9
    assert (few.low, few.sign) == (None, "too few layers to tell")


def test_layers_are_drawn_whole():
    """Twenty copies of the same layers are no more evidence than one."""
    generator = np.random.default_rng(1)
    x = generator.normal(size=8)
    y = 0.6 * x + generator.normal(size=8)
    once = correlate(x, y, range(8))
    copies = correlate(np.tile(x, 20), np.tile(y, 20), list(range(8)) * 20)
    assert (copies.low, copies.high) == pytest.approx((once.low, once.high), abs=1e-9)
    naive = correlate(np.tile(x, 20), np.tile(y, 20), range(160))
    assert naive.high - naive.low < 0.5 * (copies.high - copies.low)
    assert correlate(x, y, range(8)) == once, "the seed is fixed"


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    """Layers with four dependent checkpoints each, 24 layers: a percentile bootstrap is a little narrow."""
    generator, truth, hits, wide = np.random.default_rng(0), 0.5, 0, 0
    for _ in range(200):
        layer = generator.multivariate_normal([0, 0], [[1, truth], [truth, 1]], size=24)
        points = np.repeat(layer, 4, axis=0) + generator.multivariate_normal(
            [0, 0], [[0.01, 0.005], [0.005, 0.01]], size=96
        )
        found = correlate(points[:, 0], points[:, 1], np.repeat(np.arange(24), 4))
        hits += found.low <= truth <= found.high
        wide += found.high - found.low > 0.4
    assert 0.86 <= hits / 200 <= 0.99
    assert wide > 150


def test_within_groups():
    values = within_groups([1, 3, 100, 300, 7], "aabbc")
    assert values == pytest.approx([-1, 1, -1, 1, 0])
    assert within_groups([0.1, 0.1 + 1e-17, 0.1 + 5e-17], "aaa") == [0, 0, 0]
    assert FEWEST_LAYERS > 2
