"""The difference of a typical seed: what stays when one run in fifty collapses and drags the mean along.

Hodges and Lehmann's estimate with the interval of Wilcoxon's signed-rank test (Hollander, Wolfe and Chicken,
Nonparametric Statistical Methods, 3rd ed., sections 3.2 and 3.3): the median of all means of two differences, and those
of these means between which it lies as surely as the test says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from doratune.study.comparison.statistics import POWER


@dataclass(frozen=True)
class Typical:
    """The difference of a typical seed and its interval."""

    middle: float
    low: float
    high: float
    detectable: float
    """The smallest true difference that so many pairs, scattered like these, show with a chance of ``POWER``; by the
    width of the interval, as if estimates were normally distributed. NaN for an interval of no width, as many equal
    differences make it: it tells nothing of the scatter."""


def typical(gaps: Sequence[float], confidence: float) -> Typical | None:
    """Hodges-Lehmann estimate of paired differences; None for so few that no interval has that confidence."""
    outside = _outside(len(gaps), confidence)
    if not outside:
        return None
    first, second = np.triu_indices(len(gaps))
    values = np.asarray(gaps, dtype=np.float64)
    means = np.sort((values[first] + values[second]) / 2)
    low, high = float(means[outside - 1]), float(means[-outside])
    ends, seen = NormalDist().inv_cdf((1 + confidence) / 2), NormalDist().inv_cdf(POWER)
    detectable = (high - low) / 2 * (ends + seen) / ends if low < high else math.nan
    return Typical(float(np.median(means)), low, high, detectable)


def _outside(count: int, confidence: float) -> int:
    """So many means of two lie at and beyond either end: values of the signed-rank statistic in either tail."""
    chances = np.ones(1)
    for rank in range(1, count + 1):
        # Each rank is added or not, with equal chances.
        chances = (np.pad(chances, (0, rank)) + np.pad(chances, (rank, 0))) / 2
    return int(np.searchsorted(np.cumsum(chances), (1 - confidence) / 2, side="right"))
