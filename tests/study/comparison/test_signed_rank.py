import numpy as np
import pytest

from doratune.study.comparison.signed_rank import typical


# Critical values of tables of the signed-rank test (two-sided 5 %): T for 6, 8, 10, 20, 25 pairs.
@pytest.mark.parametrize(("count", "critical"), [(6, 0), (8, 3), (10, 8), (20, 52), (25, 89)])
def test_the_interval_is_that_of_the_test(count, critical):
    from scipy.stats import wilcoxon

    gaps = np.random.default_rng(count).normal(0.3, 1, count)
    found = typical(gaps, 0.95)
    means = np.sort([(gaps[i] + gaps[j]) / 2 for i in range(count) for j in range(i, count)])
    assert (found.low, found.high) == (means[critical], means[-1 - critical])
    assert found.middle == np.median(means)
    for end, inside in ((found.low, 1e-9), (found.high, -1e-9)):
        assert wilcoxon(gaps - end - inside, method="exact").pvalue > 0.05
        assert wilcoxon(gaps - end + inside, method="exact").pvalue <= 0.05


def test_too_few_pairs_have_no_interval():
    assert typical([1.0, 2.0, 3.0, 4.0, 5.0], 0.95) is None
    assert typical([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0.95) is not None
    assert typical([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0.975) is None


def test_one_collapsed_run_hardly_matters():
    gaps = np.random.default_rng(0).normal(0, 1, 40)
    before, after = typical(gaps, 0.95), typical([*gaps, 50.0], 0.95)
    assert after.middle == pytest.approx(before.middle, abs=0.1)
    assert after.high == pytest.approx(before.high, abs=0.15)
    assert after.detectable == pytest.approx(before.detectable, rel=0.2)


@pytest.mark.parametrize("count", [12, 40])
def test_what_could_be_seen_is_seen_as_often_as_promised(count):
    random = np.random.default_rng(3)
    said = np.mean([typical(random.normal(0, 1, count), 0.95).detectable for _ in range(50)])
    studies = [typical(random.normal(said, 1, count), 0.95) for _ in range(300)]
    found = np.mean([one.low > 0 for one in studies])
    assert 0.72 < found < 0.88, "80 of 100 but for the luck of 300 studies"


def test_equal_differences():
    found = typical([2.0] * 8, 0.95)
    assert (found.middle, found.low, found.high) == (2, 2, 2)


def test_an_interval_of_no_width_does_not_promise_that_everything_is_seen():
    assert np.isnan(typical([0.0] * 19 + [5.0], 0.95).detectable)
