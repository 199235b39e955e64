"""AdapterConfig: what an adapter is, and the only home of its defaults."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar, get_args

from doratune.errors import AdapterError

Method = Literal["dora", "lora"]
Init = Literal["default", "gaussian", "orthogonal"]
NormGradient = Literal["detached", "exact"]
Bias = Literal["none", "all", "lora_only"]
NormRefresh = Literal["forward", "step"]

ALL_LINEAR = "all-linear"
_T = TypeVar("_T")


@dataclass(frozen=True)
class AdapterConfig:
    """Options of one adapter.

    Raises:
        AdapterError: at construction, listing every option that cannot work.
    """

    method: Method = "dora"
    """dora: low-rank direction and a magnitude per output feature; lora: low-rank change only."""
    rank: int = 16
    """Rank r of the low-rank change; 0 trains the magnitude only (dora)."""
    alpha: float = 32.0
    """The change is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout probability on the input of the low-rank path."""
    targets: str | Sequence[str] = ALL_LINEAR
    """Which modules: "all-linear" (all but the output head), names ("q_proj"), or one regular expression
    that matches whole module paths."""
    exclude: str | Sequence[str] = ()
    """Modules to leave out of targets: names ("visual"), each with all that lies under it, or one regular expression
    that matches whole module paths."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other ranks for some modules, by name or regular expression."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Other alphas for some modules, by name or regular expression."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732)."""
    init: Init = "default"
    """How A starts: default (uniform, as nn.Linear), gaussian (standard deviation 1 / rank), orthogonal (rows).
    B starts at 0, so a new adapter changes nothing."""
    norm_gradient: NormGradient = "detached"
    """detached: the norm is a constant in the backward pass (paper section 4.3); exact: it is not (eq. 6)."""
    norm_refresh: NormRefresh = "forward"
    """forward: compute the norm in every forward; step: only when A, B or W have changed, which saves it in all but the
    first of accumulated micro-batches. While gradients are None, as after ``zero_grad``, it is computed anyway: not all
    optimisers change parameters openly."""
    eight_bit_outputs: str | Sequence[str] = ()
    """Layers that keep an 8-bit copy of their output for the magnitude's gradient instead of the output: names, or one
    regular expression. It saves memory where nothing else keeps the output (q, k, o and down of a Llama)."""
    bias: Bias = "none"
    """Biases to train with the adapter: none, lora_only (those of adapted layers), all."""
    modules_to_save: Sequence[str] = ()
    """Modules to train whole and save with the adapter, such as a new classification head."""

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise AdapterError.of("AdapterConfig", problems)

    def rank_of(self, path: str) -> int:
        """The rank for the module at ``path``."""
        return _lookup(self.rank_pattern, path, self.rank)

    def alpha_of(self, path: str) -> float:
        """The alpha for the module at ``path``."""
        return _lookup(self.alpha_pattern, path, self.alpha)

    def keeps_eight_bits(self, path: str) -> bool:
        """Whether the module at ``path`` keeps an 8-bit copy of its output."""
        return matches(path, self.eight_bit_outputs)

    def scale_of(self, path: str) -> float:
        """s for the module at ``path``: alpha / rank, or alpha / sqrt(rank); 0 where the rank is 0."""
        rank = self.rank_of(path)
        if rank == 0:
            return 0.0
        return self.alpha_of(path) / (math.sqrt(rank) if self.rank_stabilized else rank)


def matches(path: str, targets: str | Iterable[str]) -> bool:
    """PEFT's rule: a string is a regular expression for the whole path; names match a path or its last parts."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None if targets else False
    return any(path == target or path.endswith("." + target) for target in targets)


def _lookup(pattern: Mapping[str, _T], path: str, default: _T) -> _T:
    """The value of the first key that matches the path or its last parts (PEFT's rule)."""
    return next((value for key, value in pattern.items() if _fits(path, key)), pattern.get(path, default))


def _fits(path: str, key: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", path) is not None


def vain_options(config: AdapterConfig, paths: Collection[str]) -> Iterator[tuple[str, str]]:
    """Options for single layers, each with an entry that fits none of these: they are adapted like all others."""
    for option in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, option):
            if key not in paths and not any(_fits(path, key) for path in paths):
                yield option, key
    outputs = config.eight_bit_outputs
    for entry, meant in [(outputs, outputs)] if isinstance(outputs, str) else [(name, [name]) for name in outputs]:
        if entry and not any(matches(path, meant) for path in paths):
            yield "eight_bit_outputs", entry


def without_vain_options(config: AdapterConfig, paths: Collection[str]) -> AdapterConfig:
    """The same config for these layers, less what fits none of them."""
    vain = set(vain_options(config, paths))
    outputs = config.eight_bit_outputs
    if not isinstance(outputs, str):
        outputs = tuple(name for name in outputs if ("eight_bit_outputs", name) not in vain)
    elif ("eight_bit_outputs", outputs) in vain:
        outputs = ()
    return replace(
        config,
        rank_pattern={k: rank for k, rank in config.rank_pattern.items() if ("rank_pattern", k) not in vain},
        alpha_pattern={k: alpha for k, alpha in config.alpha_pattern.items() if ("alpha_pattern", k) not in vain},
        eight_bit_outputs=outputs,
    )


def _problems(c: AdapterConfig) -> Iterator[str]:
    wrong = list(_wrong_types(c))
    yield from wrong or _wrong_values(c)


def _wrong_types(c: AdapterConfig) -> Iterator[str]:
    for name in ("targets", "exclude", "eight_bit_outputs", "modules_to_save"):
        value: object = getattr(c, name)
        if not isinstance(value, Iterable):
            yield f"{name} must be module names; found {value!r}; leave it out for the default"
    for name in ("rank_pattern", "alpha_pattern"):
        value = getattr(c, name)
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            yield f"{name} must map module names to numbers; found {value!r}; leave it out for the default"


def _wrong_values(c: AdapterConfig) -> Iterator[str]:
    kinds = {"method": Method, "init": Init, "norm_gradient": NormGradient, "norm_refresh": NormRefresh, "bias": Bias}
    for name, kind in kinds.items():
        value = getattr(c, name)
        if value not in get_args(kind):
            yield f"{name} must be one of {', '.join(get_args(kind))}; found {value!r}"
    if c.norm_refresh == "step" and c.norm_gradient == "exact":
        yield "norm_refresh 'step' keeps no graph, which norm_gradient 'exact' needs in every forward; choose one"
    for name, rank in (("rank", c.rank), *((f"rank_pattern[{k!r}]", r) for k, r in dict(c.rank_pattern).items())):
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            yield f"{name} must be a whole number of at least 0; found {rank!r}"
        elif rank == 0 and c.method == "lora":
            yield f"{name} is 0, which trains the magnitude only, but method 'lora' has none; use 'dora' or a rank of 1"
    for name, alpha in (("alpha", c.alpha), *((f"alpha_pattern[{k!r}]", a) for k, a in dict(c.alpha_pattern).items())):
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= sys.float_info.max:
            yield f"{name} must be a finite number above 0; found {alpha!r}"
    if isinstance(c.dropout, bool) or not isinstance(c.dropout, int | float) or not 0 <= c.dropout < 1:
        yield f"dropout must be at least 0 and below 1; found {c.dropout!r}"
    stabilized: object = c.rank_stabilized
    if not isinstance(stabilized, bool):
        yield f"rank_stabilized must be True or False; found {stabilized!r}"
    if not c.targets:
        yield 'targets is empty; give "all-linear", module names, or a regular expression'
    if isinstance(c.modules_to_save, str):
        yield f"modules_to_save must be a list of names; found the string {c.modules_to_save!r}"
    for name in ("targets", "exclude", "eight_bit_outputs", "modules_to_save"):
        value = getattr(c, name)
        names = [] if isinstance(value, str) else list(value)
        if any(not isinstance(item, str) or not item for item in names):
            yield f"{name} must hold module names; found {value!r}"
    for name in ("targets", "exclude", "eight_bit_outputs", "rank_pattern", "alpha_pattern"):
        value = getattr(c, name)
        for pattern in [value] if isinstance(value, str) else value if isinstance(value, Mapping) else []:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                yield f"{name}: {pattern!r} is no regular expression ({error})"
