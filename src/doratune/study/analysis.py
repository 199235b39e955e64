"""``doratune analyze``: magnitude and direction of every weight at every checkpoint, and what goes with what."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from doratune.errors import AdapterError
from doratune.study.correlation import Correlation, correlate, within_groups
from doratune.study.decompose import Decomposition, has_spectrum, moved
from doratune.study.matrix import HELD, Matrix
from doratune.study.names import align, layer_of, module_names, natural, short_kinds, some
from doratune.study.runs import Snapshot, snapshots
from doratune.study.spectrum import EXACT, LARGEST, BaseSpectrum
from doratune.study.stored import StoredWeights, Weights
from doratune.study.stored_adapter import COPY, StoredAdapter

Spectra = Literal["last", "all", "none"]
Watch = Callable[[str, float], None]
"""Told the weight that was looked at, and the share of the work that is done."""

METHODS = {"full": "full fine-tuning", "lora": "LoRA", "dora": "DoRA"}
"""What a run's method is called in the paper."""
PAPER = {"full fine-tuning": -0.62, "LoRA": 0.83, "DoRA": -0.31}
"""Correlations of delta D with delta M in the paper (section 3.2 and 4.2): VL-BART, query and value, 6 layers, 4
checkpoints."""
OVERALL = "all kinds"
UNCHANGED = "not adapted: unchanged"
DIFFERENT = "shapes differ: "
ROUNDING = 3e-7
"""Lengths that changed by less, relatively, and angles that are smaller, are float32's rounding: they count as 0, or
noise would be correlated."""

AT_ONCE = 4
"""Small weights that are looked at at the same time, if there are so many cores: each takes up to 150 MiB."""


@dataclass(frozen=True)
class Point:
    """One weight at one checkpoint."""

    path: str
    kind: str
    layer: str | None
    """The numbered part of the model that it belongs to; None outside of all (embeddings, heads)."""
    checkpoint: int
    """Index among the run's."""
    change: Decomposition
    own_path: str = ""
    """What the checkpoint calls the weight."""


@dataclass
class Run:
    """What training did, at one or more checkpoints."""

    label: str
    method: str
    """dora, lora, or full for whole weights."""
    checkpoints: list[str]
    points: list[Point] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Weights of the base or the checkpoints that were not compared, with the reason."""

    @property
    def changed(self) -> list[Point]:
        """Points of weights in numbered layers that changed at all: those that are correlated."""
        return [point for point in self.points if point.layer is not None and point.change.size > 0]

    @property
    def is_unchanged(self) -> bool:
        """Whether every weight that was compared is as it was."""
        return not any(point.change.size > 0 for point in self.points)

    @property
    def kinds(self) -> list[str]:
        """Kinds of weights among them, in the model's order."""
        return list(dict.fromkeys(point.kind for point in self.changed))

    @property
    def reasons(self) -> dict[str, list[str]]:
        """Names of what was left out, by the reason."""
        found: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            found.setdefault(reason, []).append(name)
        return found

    @property
    def troubling(self) -> set[str]:
        """Reasons for which weights were left out that one would have wanted to compare."""
        harmless = (UNCHANGED, "tied", "a vector", "trained whole, but a vector", "a bare", COPY)
        return {reason for reason in self.left_out.values() if not reason.startswith(harmless)}

    @property
    def method_name(self) -> str:
        """What the paper calls the method."""
        return METHODS[self.method]

    @property
    def paper(self) -> float:
        """The correlation that the paper found with the method."""
        return PAPER[self.method_name]

    def last(self) -> list[Point]:
        """Every weight at the last checkpoint."""
        return [point for point in self.points if point.checkpoint == len(self.checkpoints) - 1]

    def correlation(self, kind: str | None = None, checkpoint: int | None = None) -> Correlation:
        """Of delta D with delta M, over one kind of weight or all.

        Kinds differ in size, by which alone they would correlate: over all, each point counts by its distance from its
        kind's mean, in units of its kind's deviation.
        """
        points = [p for p in self.changed if kind in (None, p.kind) and checkpoint in (None, p.checkpoint)]
        x = [p.change.magnitude if p.change.relative_magnitude > ROUNDING else 0.0 for p in points]
        y = [p.change.direction if p.change.direction > ROUNDING**2 else 0.0 for p in points]
        if kind is None:
            kinds = [p.kind for p in points]
            x, y = within_groups(x, kinds), within_groups(y, kinds)
        return correlate(x, y, [p.layer for p in points])

    def correlations(self) -> dict[str, Correlation]:
        """For every kind, and for all."""
        found = {kind: self.correlation(kind) for kind in self.kinds}
        return {**found, OVERALL: self.correlation()} if len(found) > 1 else found

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return {
            "label": self.label,
            "method": self.method,
            "checkpoints": self.checkpoints,
            "correlations": {kind: {**asdict(c), "sign": c.sign} for kind, c in self.correlations().items()},
            "points": [asdict(point) for point in self.points],
            "left_out": self.left_out,
        }


@dataclass
class Analysis:
    """What one or more runs did to a base model."""

    base: str
    runs: list[Run]

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return {"base": self.base, "paper": PAPER, "runs": [run.as_json() for run in self.runs]}


@torch.no_grad()
def analyze(
    base: Path, tuned: Mapping[str, Path], spectra: Spectra = "last", watch: Watch = lambda what, share: None
) -> Analysis:
    """Compare checkpoints with the base that they were trained from, one large weight in memory at a time.

    Args:
        base: a model's folder, or a safetensors file.
        tuned: by label, whatever ``runs.snapshots`` takes.
        spectra: of the change at each run's last checkpoint, at all, or at none.
        watch: told how far the work is.

    Raises:
        AdapterError: if files cannot be read, or a checkpoint has no weight in common with the base.
    """
    stored = StoredWeights(base)
    series = {label: _Series(label, snapshots(path), stored, spectra) for label, path in tuned.items()}
    names = short_kinds(path for path in stored.shapes if any(path in one.wanted for one in series.values()))
    total = sum(rows * columns for rows, columns in (stored.shapes[path] for path in names)) or 1
    done = 0

    def look(path: str) -> str:
        with stored.open(path) as mapped:
            weight = mapped.held()
            base = BaseSpectrum(weight) if has_spectrum(weight) else None
            for one in series.values():
                one.look(path, names[path], weight, base)
        return path

    ordered = sorted(names, key=natural)
    for path in _each(look, ordered, stored.shapes):
        done += stored.shapes[path][0] * stored.shapes[path][1]
        watch(path, done / total)
    places = {path: place for place, path in enumerate(ordered)}
    for one in series.values():
        one.run.points.sort(key=lambda point: (places[point.path], point.checkpoint))
    watch("", 1.0)
    return Analysis(str(base), [one.run for one in series.values()])


def _each(look: Callable[[str], str], paths: Sequence[str], shapes: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """Look at every weight; at small ones side by side, since LAPACK makes little use of more than one core there."""
    small = dict.fromkeys(p for p in paths if shapes[p][0] * shapes[p][1] <= HELD and min(shapes[p]) <= EXACT)
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(min(AT_ONCE, threads), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(look, small)
    torch.set_num_threads(threads)  # for threads that begin later, whose number the pool's have set, too
    yield from map(look, (path for path in paths if path not in small))


class _Series:
    """The checkpoints of one run while they are being looked at."""

    def __init__(self, label: str, found: list[Snapshot], base: StoredWeights, spectra: Spectra) -> None:
        self.checkpoints = [one.open() for one in found]
        method = getattr(self.checkpoints[-1], "method", "full")
        self.run = Run(label, method, [one.name for one in found], left_out=dict(base.left_out))
        last = len(found) - 1
        self.with_spectrum = {"last": {last}, "all": set(range(last + 1)), "none": set()}[spectra]
        self.paths: list[dict[str, str]] = []
        for one, checkpoint in zip(found, self.checkpoints, strict=True):
            self.paths.append(self._fit(one, checkpoint, base))
        self.wanted = set().union(*self.paths)

    def _fit(self, one: Snapshot, checkpoint: Weights, base: StoredWeights) -> dict[str, str]:
        """Of each of the base's weights that can be compared, the path in the checkpoint."""
        names = align(base.shapes, checkpoint.shapes)
        if isinstance(checkpoint, StoredAdapter) and checkpoint.adapted - set(names.values()):
            # An adapter names modules; transformers keeps the weights of some models under names of old.
            modern = module_names(base.source, base.shapes)
            renamed = align(modern, checkpoint.shapes)
            if len(renamed) > len(names):
                names = {modern[path]: own for path, own in renamed.items()}
        if isinstance(checkpoint, StoredAdapter):
            checkpoint.turn(own for path, own in names.items() if base.is_transposed(path))
        fitting: dict[str, str] = {}
        for path, own in names.items():
            if checkpoint.shapes[own] == base.shapes[path]:
                fitting[path] = own
            else:
                shapes = f"{_shape(base.shapes[path])} in the base, {_shape(checkpoint.shapes[own])} in {one.name}"
                self.run.left_out[path] = f"{DIFFERENT}{shapes}"
        if not fitting and names:
            differing = [f"{path}: {self.run.left_out[path].removeprefix(DIFFERENT)}" for path in names]
            heading = f"shapes differ between {base.source} and {one.folder}, which are of different models"
            raise AdapterError.of(heading, differing, at_most=5)
        if not fitting:
            raise AdapterError(
                f"{one.folder} and {base.source} have no weight in common; the base has {some(base.shapes)}, "
                f"the other {some(checkpoint.shapes)}"
            )
        whole = isinstance(checkpoint, StoredWeights)
        absent = f"not in {one.name}" if whole else UNCHANGED
        self.run.left_out |= {path: absent for path in base.shapes if path not in names}
        taken = set(names.values())
        self.run.left_out |= {own: "not in the base" for own in checkpoint.shapes if own not in taken}
        self.run.left_out |= {key: why for key, why in checkpoint.left_out.items() if key not in self.run.left_out}
        return fitting

    def look(self, path: str, kind: str, weight: Matrix, base: BaseSpectrum | None) -> None:
        for index, (checkpoint, paths) in enumerate(zip(self.checkpoints, self.paths, strict=True)):
            if path not in paths:
                continue
            wanted = index in self.with_spectrum
            if wanted and weight.shape[0] * weight.shape[1] > LARGEST:
                self.run.left_out[f"spectrum of {path}"] = f"more than {LARGEST:,} numbers"
            with checkpoint.open(paths[path], weight) as after:
                change = moved(weight, after.held(), base if wanted else None)
            if not math.isfinite(change.size):
                self.run.left_out[path] = "holds NaN or infinity"
                continue
            self.run.points.append(Point(path, kind, layer_of(path)[0], index, change, paths[path]))


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
