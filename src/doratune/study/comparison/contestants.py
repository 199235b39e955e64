"""Who is compared: a training method, with a rank where it has one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from doratune.train.choices import TrainMethod

RANKED = {"lora": "LoRA", "dora": "DoRA"}
UNRANKED = {"magnitude": "magnitudes only", "full": "full fine-tuning", "head": "head only"}
PATTERN = re.compile(r"(lora|dora) (?:(\d+)|r(?:/([1-9]\d*))?)")
FORMS = "'lora r', 'dora r', 'dora r/2', 'dora 8', " + ", ".join(map(repr, UNRANKED))


@dataclass(frozen=True)
class Contestant:
    """A method at a rank; the rank is None where the method has none."""

    method: TrainMethod
    rank: int | None = None

    @property
    def key(self) -> str:
        """Its name in files and in the study."""
        return self.method if self.rank is None else f"{self.method}-{self.rank}"

    @property
    def name(self) -> str:
        """Its name in sentences."""
        return UNRANKED[self.method] if self.rank is None else f"{RANKED[self.method]} rank {self.rank}"


@dataclass(frozen=True)
class Pair:
    """Two contestants of whom the difference ``other - base`` is asked."""

    other: Contestant
    base: Contestant

    @property
    def is_claim(self) -> bool:
        """Whether both have a rank: what is claimed of DoRA, as opposed to methods shown for reference."""
        return self.other.rank is not None and self.base.rank is not None

    @property
    def name(self) -> str:
        """Its name in tables and plots."""
        return f"{self.other.name} − {self.base.name}"

    @property
    def key(self) -> str:
        """Its name in files."""
        return f"{self.other.key}_minus_{self.base.key}"


def problem_of(method: str) -> str | None:
    """Why a word names no method, or None."""
    if method in UNRANKED or PATTERN.fullmatch(method):
        return None
    return f"methods: expected {FORMS}; found {method!r}"


def uneven(methods: Iterable[str], ranks: Sequence[int]) -> Iterator[str]:
    """Parts of a rank that are no whole numbers, as of ``r/2`` at rank 3: another rank would be compared."""
    for method in dict.fromkeys(methods):
        found = PATTERN.fullmatch(method)
        divisor = int(found[3] or 1) if found else 1
        wrong = [rank for rank in ranks if rank % divisor]
        if wrong:
            yield f"methods: {method!r} needs ranks that can be divided by {divisor}; found {wrong}"


def contestant(method: str, rank: int) -> Contestant:
    """The method of a recipe at one of its ranks, which ``uneven`` finds no fault with."""
    found = PATTERN.fullmatch(method)
    if found is None:
        return Contestant(cast(TrainMethod, method))
    name, fixed, divisor = found.groups()
    return Contestant(cast(TrainMethod, name), int(fixed) if fixed else rank // int(divisor or 1))


def contestants(methods: Iterable[str], ranks: Sequence[int]) -> list[Contestant]:
    """Every method at every rank, each once."""
    return list(dict.fromkeys(contestant(method, rank) for method in methods for rank in ranks))


def pairs(methods: Sequence[str], ranks: Sequence[int]) -> list[Pair]:
    """Every method against the first, at every rank."""
    found = [Pair(contestant(m, rank), contestant(methods[0], rank)) for m in methods[1:] for rank in ranks]
    return list(dict.fromkeys(pair for pair in found if pair.other != pair.base))
