"""Races: how much longer each of several functions takes than a floor, measured so that changes of the machine cancel.

All lanes run in one process. Each round runs every lane once, in an order drawn anew, and divides its time by the
floor's of the *same* round; what slows the machine for a second slows both. The result is the median of these ratios.
Rounds in which other processes had the processors are left out.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from doratune.study.disturbance import seconds_kept_waiting

CONFIDENCE = 0.95
WARM_UP = 2
"""Untimed rounds: first calls compile, allocate and fill caches."""
FEWEST_ROUNDS = 6
"""However short the time: with fewer the interval is below 95 %."""
DISTURBED = 0.05
"""A round does not count if the process was kept waiting for more than this share of a lane's time."""
PATIENCE = 9
"""Rounds after which the least disturbed ones have to do."""


@dataclass(frozen=True)
class Lane:
    """One contestant."""

    name: str
    run: Callable[[], Any]
    """What is timed."""
    before: Callable[[int], Any] | None = None
    """Called with the number of the round, untimed: changes parameters, drops gradients."""
    after: Callable[[], Any] | None = None
    """Called after each run, untimed: frees memory that the other lanes may need."""


@dataclass(frozen=True)
class Timing:
    """What a race says about one lane."""

    name: str
    milliseconds: float
    """Median of a single run."""
    ratio: float
    """Median of the ratios to the floor's time in the same round."""
    low: float
    high: float
    """Confidence interval of that median."""
    rounds: int
    seconds: tuple[float, ...] = ()
    """Of every round that counts."""
    left_out: int = 0
    """Rounds that other processes disturbed."""

    def over(self, other: Timing) -> tuple[float, float, float]:
        """Median of the ratios to another lane's times in the same rounds, and its confidence interval."""
        ratios = sorted(mine / its for mine, its in zip(self.seconds, other.seconds, strict=True))
        return statistics.median(ratios), *median_interval(ratios)


def race(
    lanes: Sequence[Lane],
    floor: str,
    *,
    seconds: float = 10.0,
    rounds: int = 100,
    warm_up: int = WARM_UP,
    device: torch.device | str = "cpu",
    seed: int = 0,
    watch: Callable[[int, float], Any] | None = None,
    failed: Callable[[str, Exception], Any] | None = None,
) -> list[Timing]:
    """Run the lanes against each other.

    Args:
        floor: name of the lane that the others are compared with.
        seconds: no round begins after this time, once there are enough of them.
        rounds: no more than this many rounds.
        warm_up: untimed rounds before; 0 if every lane has run already.
        device: waited for before each look at the clock.
        seed: of the order of the lanes.
        watch: called after each round with its number and the share of the race that is over.
        failed: called with the name of a lane that raises, and with what it raised; the others go on. None: that ends
            the race.

    Returns:
        One Timing a lane, in the order of the lanes, without those that failed; none at all if the floor did.
    """
    order = list(lanes)
    shuffle = random.Random(seed).shuffle
    names = {lane.name for lane in lanes}
    if floor not in names or len(names) != len(order):
        raise ValueError(f"lanes need different names, and one is the floor {floor!r}; found {[x.name for x in order]}")
    for round_number in range(-warm_up, 0):
        order = _run(order, round_number, device, failed)[0]
    start = time.perf_counter()
    done: list[dict[str, tuple[float, float]]] = []
    for round_number in itertools.count():
        shuffle(order)
        left, found = _run(order, round_number, device, failed)
        if floor not in found:
            return []
        if len(left) == len(order):
            done.append(found)
        else:  # Lanes after a failure had to allocate anew: the round does not count.
            done = [{lane.name: earlier[lane.name] for lane in left} for earlier in done]
        order = left
        elapsed = time.perf_counter() - start
        if watch is not None:
            watch(round_number, max(elapsed / seconds if seconds else 1.0, len(done) / rounds))
        enough = _undisturbed(done) >= FEWEST_ROUNDS or len(done) >= PATIENCE
        if len(done) >= rounds or (elapsed >= seconds and enough):
            break
    counted = _that_count(done)
    times = {lane.name: [found[lane.name][0] for found in counted] for lane in lanes if lane in order}
    return [_timing(name, own, times[floor], len(done) - len(counted)) for name, own in times.items()]


def _run(
    order: list[Lane], round_number: int, device: torch.device | str, failed: Callable[[str, Exception], Any] | None
) -> tuple[list[Lane], dict[str, tuple[float, float]]]:
    """One round: the lanes that are left after it, and what ``_timed`` says of each."""
    left, found = [], {}
    for lane in order:
        try:
            found[lane.name] = _timed(lane, round_number, device)
            left.append(lane)
            continue
        except Exception as error:
            if failed is None:
                raise
            failed(lane.name, error)
        gc.collect()  # only now: the traceback kept what was allocated when the lane failed
    return left, found


def _disturbance(found: dict[str, tuple[float, float]]) -> float:
    """Largest share of a lane's time in one round that the process was kept waiting."""
    return max(waited / seconds if seconds else 0.0 for seconds, waited in found.values())


def _undisturbed(done: list[dict[str, tuple[float, float]]]) -> int:
    return sum(_disturbance(found) <= DISTURBED for found in done)


def _that_count(done: list[dict[str, tuple[float, float]]]) -> list[dict[str, tuple[float, float]]]:
    """Undisturbed rounds, or the least disturbed ones where there are too few."""
    least = sorted(done, key=_disturbance)
    return least[: max(_undisturbed(done), FEWEST_ROUNDS)]


def _timed(lane: Lane, round_number: int, device: torch.device | str) -> tuple[float, float]:
    """Seconds that a lane took, and for how many of them the process was kept waiting."""
    if lane.before is not None:
        lane.before(round_number)
    with _no_garbage_collection():
        synchronise(device)
        waited = seconds_kept_waiting()
        start = time.perf_counter()
        result = lane.run()
        synchronise(device)
        seconds = time.perf_counter() - start
        waited = max(seconds_kept_waiting() - waited, 0.0)
    del result  # freeing it is not timed
    if lane.after is not None:
        lane.after()
    return seconds, waited


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def synchronise(device: torch.device | str) -> None:
    """Wait until the device has done all it was given; a CPU always has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _timing(name: str, times: list[float], floor: list[float], left_out: int) -> Timing:
    ratios = sorted(mine / its for mine, its in zip(times, floor, strict=True))
    low, high = median_interval(ratios)
    ratio = statistics.median(ratios)
    return Timing(name, 1e3 * statistics.median(times), ratio, low, high, len(times), tuple(times), left_out)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """A confidence interval of the median from order statistics, whatever the distribution.

    The k-th smallest and k-th largest value enclose the median except with probability ``2 P(Bin(n, 1/2) < k)``. With
    fewer than six values none reaches 95 %: then it is the whole range.
    """
    ordered, n = sorted(values), len(values)
    tail, k = 0.0, 0
    while k < n:
        tail += math.comb(n, k) * 0.5**n
        if 2 * tail > 1 - CONFIDENCE:
            break
        k += 1
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]
