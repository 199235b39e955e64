"""Means and paired differences with intervals, and the smallest difference that could have been seen.

All are Student's t on one value a seed: the variation that intervals cover is that between seeds (start of the adapter
and the head, order of the data, dropout), not that between test sets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from doratune.extras import require

POWER = 0.8
"""Chance of seeing a difference that ``detectable`` speaks of."""


@dataclass(frozen=True)
class MeanInterval:
    """A mean and its confidence interval; without an end where there are fewer than two values."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Difference(MeanInterval):
    """A mean of paired differences."""

    detectable: float
    """The smallest true difference that so many pairs, scattered like these, show with a chance of ``POWER``."""

    @property
    def is_found(self) -> bool:
        """Whether the interval leaves out 0; equal differences have none that would mean something."""
        return self.low < self.high and (self.low > 0 or self.high < 0)

    @property
    def largest(self) -> float:
        """The largest difference, up or down, that the interval leaves possible."""
        return max(abs(self.low), abs(self.high))


def mean_interval(values: Sequence[float], confidence: float) -> MeanInterval:
    """Mean of values that are one a seed."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return MeanInterval(mean, math.nan, math.nan, count)
    half = _error(values) * float(require("scipy.stats", "study").t.ppf((1 + confidence) / 2, count - 1))
    return MeanInterval(mean, mean - half, mean + half, count)


def difference(gaps: Sequence[float], confidence: float) -> Difference:
    """Mean of paired differences, one a seed."""
    found = mean_interval(gaps, confidence)
    return Difference(found.mean, found.low, found.high, found.count, detectable(gaps, confidence))


def of_each(confidence: float, together: int) -> float:
    """Confidence of each of several intervals that are to hold at once with ``confidence`` (Bonferroni)."""
    return 1 - (1 - confidence) / together


def detectable(gaps: Sequence[float], confidence: float) -> float:
    """The smallest true mean that a two-sided t test of values scattered like these finds with a chance of ``POWER``.

    Solves the test's power function, by the noncentral t distribution; NaN for fewer than two values.
    """
    count = len(gaps)
    if count < 2:
        return math.nan
    stats, optimize = require("scipy.stats", "study"), require("scipy.optimize", "study")
    threshold = float(stats.t.ppf((1 + confidence) / 2, count - 1))

    def excess(noncentrality: float) -> float:
        """Power above what is wanted."""
        return float(stats.nct.sf(threshold, count - 1, noncentrality)) - POWER

    return _error(gaps) * float(optimize.brentq(excess, 0.0, 4 * threshold + 10))


def _error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 where values differ by rounding only."""
    if np.ptp(values) <= 1e-12 * np.max(np.abs(values)):
        return 0.0
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))
