"""The recipe of a comparison: one of ``doratune train``, with a table [compare] that says what is compared."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from doratune.errors import AdapterError
from doratune.study.comparison.contestants import (
    RANKED,
    UNRANKED,
    Contestant,
    Pair,
    contestants,
    pairs,
    problem_of,
    uneven,
)
from doratune.train.config import TrainConfig
from doratune.train.option_types import converted, describe, fits
from doratune.train.recipe import entries, find_recipe, from_toml, read_toml
from doratune.train.sources import path_of

SET_FOR_EACH = ("output", "resume", "seed", "learning_rate", "method", "rank", "alpha")
NOT_COMPARED = (*SET_FOR_EACH, "start_from", "log_every", "workers")
"""Options of a run that a comparison sets itself, or that change no result."""
CONTENT = "content of "
"""What the identity calls the content of data, before their name."""


@dataclass(frozen=True)
class Grid:
    """What is compared; the table [compare] of a recipe."""

    methods: Sequence[str] = ("lora r", "dora r", "dora r/2")
    """The first is what the others are compared with. With a rank (r, r/2, a number): lora, dora; without: magnitude,
    full, head."""
    ranks: Sequence[int] = ()
    """Values of r; none: the adapter's rank. alpha / rank stays that of the adapter."""
    learning_rates: Sequence[float] = (2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
    """Each method is tried with each, and goes on with the best."""
    learning_rates_of: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Other learning rates for some methods: lora, dora, magnitude, full, head."""
    sweep_seeds: int = 2
    """Runs of each learning rate, measured on the evaluation data."""
    seeds: int = 10
    """Runs of each method with its chosen rate, measured on the test data; more can be added later."""
    confidence: float = 0.95
    """Of intervals; for the differences: of all of them together."""

    def rates(self, one: Contestant) -> tuple[float, ...]:
        """The learning rates that a contestant is tried with, ascending."""
        return tuple(sorted({float(rate) for rate in self.learning_rates_of.get(one.method, self.learning_rates)}))

    def problems(self) -> Iterator[str]:
        """Everything that cannot work."""
        yield from filter(None, map(problem_of, self.methods))
        if len(set(self.methods)) < 2:
            found = ", ".join(dict.fromkeys(self.methods)) or "none"
            yield f"methods: at least two are needed to compare; found {found}"
        if any(rank < 1 for rank in self.ranks):
            yield f"ranks must be at least 1; found {list(self.ranks)}"
        for name, rates in {"learning_rates": self.learning_rates, **self.learning_rates_of}.items():
            if not rates or any(not 0 < rate < 1e3 for rate in rates):
                yield f"{name}: at least one learning rate above 0 is needed; found {list(rates)}"
        known = (*RANKED, *UNRANKED)
        for name in self.learning_rates_of:
            if name not in known:
                yield f"learning_rates_of: expected {', '.join(known)}; found {name!r}"
        if self.sweep_seeds < 1:
            yield f"sweep_seeds must be at least 1; found {self.sweep_seeds}"
        if self.seeds < 2:
            yield f"seeds must be at least 2: one run of each says nothing about a difference; found {self.seeds}"
        if not 0.5 <= self.confidence < 1:
            yield f"confidence must be at least 0.5 and below 1; found {self.confidence}"


@dataclass(frozen=True)
class Comparison:
    """A recipe that was read."""

    train: TrainConfig
    grid: Grid

    @property
    def ranks(self) -> tuple[int, ...]:
        """Values of r."""
        return tuple(self.grid.ranks) or (self.train.adapter.rank,)

    @property
    def contestants(self) -> list[Contestant]:
        """Everybody who is compared."""
        return contestants(self.grid.methods, self.ranks)

    @property
    def pairs(self) -> list[Pair]:
        """Whose difference is asked."""
        return pairs(self.grid.methods, self.ranks)

    @property
    def by_accuracy(self) -> bool:
        """Whether the score is the share of right answers, and not the loss."""
        return self.train.task != "text-generation"

    def config(self, one: Contestant, learning_rate: float, seed: int, output: Path) -> TrainConfig:
        """One run. The same seed means the same order of data, start of the head and, at one rank, of A."""
        adapter = self.train.adapter
        if one.rank is not None:
            adapter = dataclasses.replace(adapter, rank=one.rank, alpha=adapter.alpha / adapter.rank * one.rank)
        return dataclasses.replace(
            self.train,
            method=one.method,
            adapter=adapter,
            learning_rate=learning_rate,
            seed=seed,
            output=output,
            eval_every=None,  # measured at the end; in between it would count as training's time
        )

    def identity(self) -> dict[str, Any]:
        """What makes results comparable: every option that changes one, and the content of local data."""
        run = {key: value for key, value in entries(self.train).items() if key not in NOT_COMPARED}
        grid = {f"compare.{key}": value for key, value in dataclasses.asdict(self.grid).items()}
        del grid["compare.seeds"], grid["compare.confidence"]
        train = self.train
        names = dict.fromkeys((*train.data, *train.eval_data, *train.test_data))
        scale = train.adapter.alpha / train.adapter.rank if train.adapter.rank else 0.0
        contents = {CONTENT + name: fingerprint(path_of(name)) for name in names if path_of(name).exists()}
        every = {**run, "alpha / rank": scale, **grid, "compare.ranks": self.ranks, **contents}
        return json.loads(json.dumps(every, default=str))  # as the study gives it back


def load(name: str, seeds: int | None = None) -> Comparison:
    """Read a recipe.

    Args:
        name: path, or name of a shipped recipe.
        seeds: instead of the recipe's.

    Raises:
        AdapterError: listing every problem with its options.
    """
    path = find_recipe(name)
    raw = read_toml(path)
    table = raw.pop("compare", {})
    found: list[str] = []
    grid: dict[str, Any] = {}
    if isinstance(table, dict):
        grid = _grid(table, found)
    else:
        found.append(f"compare: expected a table, found {table!r}")
    run: dict[str, Any] = {}
    try:
        run = from_toml(raw, path)
    except AdapterError as error:
        found += error.problems
    if found:
        raise AdapterError.of(f"recipe {path}", found)
    train = TrainConfig(**{"model": "", "data": (), "save_every": None, **run})
    if seeds is not None:
        grid["seeds"] = seeds
    comparison = Comparison(train, Grid(**grid))
    found = [*comparison.grid.problems(), *uneven(comparison.grid.methods, comparison.ranks), *_of_the_run(train)]
    if not found and not comparison.pairs:
        methods = ", ".join(comparison.grid.methods)
        found.append(f"methods: at least two are needed to compare; {methods} are all {comparison.contestants[0].name}")
    if found:
        raise AdapterError.of(f"recipe {path}", found)
    return comparison


def _grid(table: Mapping[str, Any], found: list[str]) -> dict[str, Any]:
    hints = get_type_hints(Grid)
    values = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in hints:
            close = difflib.get_close_matches(name, hints, n=1)
            found.append(f"compare: unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        elif not fits(value, hints[name]):
            found.append(f"compare.{key}: expected {describe(hints[name])}, found {value!r}")
        else:
            values[name] = converted(value, hints[name])
    return values


def _of_the_run(train: TrainConfig) -> Iterator[str]:
    if not train.test_data and not train.test_fraction:
        yield "test_data or test_fraction is needed: learning rates are chosen on the evaluation data, scores are not"
    if train.adapter.rank < 1:
        yield f"rank must be at least 1, for alpha / rank; found {train.adapter.rank}"
    if train.start_from is not None:
        yield "start_from: the methods and ranks that are compared begin afresh; leave it out"
    if train.keep_best:
        yield "keep_best: runs that are compared are measured at their end, and not between; leave it and patience out"
    if train.prompt is not None:
        yield "prompt asks for samples, which a comparison does not make"


def fingerprint(path: Path) -> str:
    """What a file, or a folder's files, hold; for folders by names and sizes."""
    digest = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    else:
        for file in sorted(path.rglob("*")):
            if file.is_file():
                digest.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]
