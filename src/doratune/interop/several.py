"""Files that hold the adapters of several models, as kohya's and diffusers' do: one safetensors file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from doratune.checkpoint import LISTED, attach_filled, config_of, layers_to_save, take_back, tensors_to_save
from doratune.config import AdapterConfig
from doratune.contents import read_contents
from doratune.errors import AdapterError
from doratune.files import read_file
from doratune.layers import AdaptedLayer
from doratune.model import active_adapter
from doratune.peft_config import PeftOptions
from doratune.targets import as_targets, plain_modules, refuse_model, unwrap

PICKLED = (".bin", ".ckpt", ".pt", ".pth")
Models = Mapping[str, nn.Module | None]
Value = TypeVar("Value", int, float)


@dataclass
class Part:
    """What a file holds for one model, in PEFT's terms."""

    model: nn.Module
    options: PeftOptions
    tensors: dict[str, Tensor]
    """By PEFT's keys."""
    names: dict[str, str]
    """What PEFT's keys and the paths of layers are called in the file, for messages."""


def checked(models: Models, example: str) -> dict[str, nn.Module | None]:
    """The models by their prefix in the file, without what runs them; None where a part of the file is to be left out.

    Raises:
        AdapterError: if ``models`` is something else, or one of them cannot have adapters of doratune.
    """
    right = isinstance(models, Mapping) and all(
        isinstance(prefix, str) and isinstance(model, nn.Module | None) for prefix, model in models.items()
    )
    if not right or not any(isinstance(model, nn.Module) for model in models.values()):
        found = {key: type(value).__name__ for key, value in models.items()} if isinstance(models, Mapping) else models
        found = found if isinstance(found, dict) else type(found).__name__
        raise AdapterError(
            f"models: expected the file's prefixes, each with its model, such as {example}; found {found}"
        )
    given = {prefix: None if model is None else unwrap(model) for prefix, model in models.items()}
    for model in given.values():
        if model is not None:
            refuse_model(model, plain_modules(model))  # PEFT's layers, which a pipeline that has loaded a LoRA file has
    return given


def read_one_file(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        AdapterError: if it is missing, a pickle file, truncated or something else.
    """
    if file.is_dir():
        raise AdapterError(f"{file} is a folder; name the safetensors file")
    if not file.exists():
        raise AdapterError(f"{file} does not exist; name a safetensors file")
    if file.suffix in PICKLED:
        raise AdapterError(
            f"{file} is a pickle file by its name, which can run code and is never read; "
            "save the adapter as safetensors with the program that made it"
        )
    return read_file(file)


def grouped(findings: Iterable[tuple[str, str]]) -> list[str]:
    """Of keys, each with a reason, one line a reason: the first of the keys that it holds for, and how many more."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in findings:
        by_reason.setdefault(reason, []).append(key)
    return [
        keys[0] + (f" (and {len(keys) - 1} more)" if keys[1:] else "") + f": {reason}"
        for reason, keys in by_reason.items()
    ]


def rank_by_shape(A: Tensor | None, B: Tensor | None) -> int:
    """The rank that A has, or B where there is no A; never 0, so that it is the shape that is found wrong."""
    sizes = A.shape[:1] if A is not None else B.shape[1:2] if B is not None else ()
    return max((1, *sizes))


def options_for(model: nn.Module, scales: Mapping[str, tuple[int, float]], dora: bool) -> PeftOptions:
    """Options that name exactly these layers, by path, with the rank and alpha of each."""
    rank, ranks = _with_exceptions({path: rank for path, (rank, _) in scales.items()})
    alpha, alphas = _with_exceptions({path: alpha for path, (_, alpha) in scales.items()})
    config = AdapterConfig(
        method="dora" if dora else "lora",
        rank=rank,
        alpha=alpha,
        targets=as_targets(list(scales), plain_modules(model)),
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )
    # All that these formats do not have is refused where they are read, so PEFT's own limits do not matter.
    return PeftOptions(config, None, [], own_type=True)


def _with_exceptions(values: Mapping[str, Value]) -> tuple[Value, dict[str, Value]]:
    """The commonest value, and of each other one the expression that fits the paths that have it."""
    commonest = Counter(values.values()).most_common(1)[0][0]
    paths: dict[Value, list[str]] = {}
    for path, value in values.items():
        if value != commonest:
            paths.setdefault(value, []).append(re.escape(path))
    return commonest, {f"^(?:{'|'.join(found)})": value for value, found in paths.items()}


def attach_parts(file: Path, parts: Iterable[Part], problems: list[str], name: str, *, trainable: bool) -> None:
    """Attach every part to its model, or none.

    Raises:
        AdapterError: listing the problems found before and here, the first ten of many; the models are then unchanged.
    """
    read = []
    for part in parts:
        contents = read_contents(part.model, part.options, part.tensors, {})
        for problem in contents.problems:
            key, colon, reason = problem.partition(": ")
            problems.append(f"{part.names.get(key, key)}{colon}{reason}")
        read.append((part.model, contents))
    if problems:
        raise AdapterError.of(f"{file} does not fit", problems, at_most=LISTED)
    attached: list[tuple[nn.Module, str | None]] = []
    try:
        for model, contents in read:
            before = active_adapter(model)
            attach_filled(model, contents, config_of(model, contents), name, trainable=trainable)
            attached.append((model, before))
    except BaseException:
        for model, before in attached:
            take_back(model, name, before)
        raise


@dataclass
class Adapter:
    """One model's adapter, to be written."""

    model: nn.Module
    layers: dict[str, AdaptedLayer]
    tensors: dict[str, Tensor]
    """By PEFT's keys."""


def adapters(models: Mapping[str, nn.Module | None], name: str, problems: list[str]) -> dict[str, Adapter]:
    """Each model's adapter by the model's prefix; what cannot be written goes to ``problems``."""
    found = {}
    for prefix, model in models.items():
        if model is not None:
            try:
                found[prefix] = Adapter(model, layers_to_save(model, name), tensors_to_save(model, name))
            except AdapterError as error:
                problems += [f"{prefix}: {problem}" for problem in error.problems]
    return found
