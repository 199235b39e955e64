"""How delta D goes with delta M: regression line, correlation, and an interval bootstrapped over layers.

Checkpoints of one run follow from each other, and so do a layer's weights: a bootstrap over points would call the
same observation many. Whole layers are drawn instead, each with all its points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000
CONFIDENCE = 0.95
SEED = 0
FEWEST_LAYERS = 4
"""With fewer layers there is no interval: there would be next to nothing to draw."""
FEWEST_POINTS = 3
SAME = 1e-9
"""Values whose relative differences are below this are the same."""


@dataclass(frozen=True)
class Correlation:
    """Pearson's correlation of two quantities, and the line of y against x."""

    value: float | None
    """None where there are too few points, or one quantity is the same everywhere."""
    low: float | None
    """Interval by the percentile bootstrap over layers; None where there are too few layers."""
    high: float | None
    slope: float | None
    intercept: float | None
    points: int
    layers: int

    @property
    def sign(self) -> str:
        """What the interval lets one say."""
        if self.value is None:
            return "not defined"
        if self.low is None or self.high is None:
            return "too few layers to tell"
        return "positive" if self.low > 0 else "negative" if self.high < 0 else "undecided"


def correlate(x: Sequence[float], y: Sequence[float], layers: Sequence[object]) -> Correlation:
    """Correlate y with x.

    Args:
        x, y: one number for each point.
        layers: whose each point is; points of one layer are drawn together.
    """
    names = {layer: index for index, layer in enumerate(dict.fromkeys(layers))}
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    count = len(a)
    if count < FEWEST_POINTS or not (_varies(a) and _varies(b)):
        return Correlation(None, None, None, None, None, count, len(names))
    # In units of their deviations from the mean, so that sums of squares lose nothing.
    u, v = (a - a.mean()) / a.std(), (b - b.mean()) / b.std()
    owner = np.array([names[layer] for layer in layers])
    sums = np.stack(
        [np.bincount(owner, weights, len(names)) for weights in (np.ones(count), u, v, u * u, v * v, u * v)]
    )
    value = float(_correlation(sums.sum(1)))
    slope = value * float(b.std() / a.std())
    low, high = _interval(sums) if len(names) >= FEWEST_LAYERS else (None, None)
    return Correlation(value, low, high, slope, float(b.mean()) - slope * float(a.mean()), count, len(names))


def _interval(sums: np.ndarray) -> tuple[float | None, float | None]:
    """Percentiles over resamples; one in which nothing varies says nothing and is passed over."""
    layers = sums.shape[1]
    drawn = np.random.default_rng(SEED).multinomial(layers, np.full(layers, 1 / layers), size=RESAMPLES)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = _correlation(sums @ drawn.T)
    values = values[np.isfinite(values)]
    if not len(values):
        return None, None
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _correlation(sums: np.ndarray) -> np.ndarray:
    """From n and the sums of x, y, x^2, y^2 and xy."""
    n, x, y, xx, yy, xy = sums
    spread = np.sqrt(np.clip(xx - x * x / n, 0, None) * np.clip(yy - y * y / n, 0, None))
    return np.clip((xy - x * y / n) / spread, -1, 1)


def within_groups(values: Sequence[float], groups: Sequence[object]) -> list[float]:
    """Deviations from each group's mean, in units of the group's own deviation; 0 where nothing varies."""
    array = np.asarray(values, dtype=np.float64)
    result = np.zeros_like(array)
    for group in dict.fromkeys(groups):
        own = np.array([other == group for other in groups])
        if _varies(array[own]):
            result[own] = (array[own] - array[own].mean()) / array[own].std()
    return result.tolist()


def _varies(values: np.ndarray) -> bool:
    """Whether values differ by more than the rounding of the sums that they are."""
    return bool(np.ptp(values) > SAME * np.abs(values).max())
