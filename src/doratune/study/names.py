"""What weights are called: layers and kinds, and the same weight under two names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from doratune.extras import installed, require
from doratune.renamed import renamed


def align(base: Iterable[str], other: Iterable[str]) -> dict[str, str]:
    """Match the paths of a base with those of a checkpoint, which a head's class may have put behind a name.

    A ``BertModel`` is ``bert`` inside a ``BertForSequenceClassification``; the base may be the one or the other. Of
    several names that fit as many paths, the first one counts.
    """
    old, new = list(base), dict.fromkeys(other)
    prefixes = dict.fromkeys(["", *(".".join(path.split(".")[:n]) + "." for path in new for n in (1, 2))])
    shorter = dict.fromkeys(".".join(path.split(".")[:n]) + "." for path in old for n in (1, 2))
    candidates = [{p: prefix + p for p in old if prefix + p in new} for prefix in prefixes]
    candidates += [
        {p: p.removeprefix(prefix) for p in old if p.startswith(prefix) and p.removeprefix(prefix) in new}
        for prefix in shorter
    ]
    return max(candidates, key=len)


def layer_of(path: str) -> tuple[str | None, str]:
    """The layer that a path names by its first number ("model.layers.3"), and the rest with other numbers as "*"."""
    parts = path.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    layer = None if numbered is None else ".".join(parts[: numbered + 1])
    rest = parts if numbered is None else parts[numbered + 1 :] or parts
    return layer, ".".join("*" if part.isdigit() else part for part in rest)


def short_kinds(paths: Iterable[str]) -> dict[str, str]:
    """For each path its kind: what it is called in its layer, by as few of its last parts as tell kinds apart."""
    full = {path: layer_of(path)[1] for path in paths}
    kinds = sorted(set(full.values()))
    short = {}
    for kind in kinds:
        parts = kind.split(".")
        for n in range(1, len(parts) + 1):
            name = ".".join(parts[-n:])
            if sum(other == name or other.endswith(f".{name}") for other in kinds) == 1:
                break
        short[kind] = name
    return {path: short[kind] for path, kind in full.items()}


def natural(path: str) -> list[tuple[int, str]]:
    """Sort key by which layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def some(names: Iterable[str], most: int = 3) -> str:
    """The first names and how many more there are, for a message."""
    every = list(names)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "") or "none"


def module_names(source: Path, paths: Iterable[str]) -> dict[str, str]:
    """For weights in a model's files, by the module that transformers would load each into, the path in the files.

    Empty where transformers is not installed, or nothing tells which model it is. The model is laid out without memory.
    """
    if not installed("transformers") or not (source / "config.json").is_file():
        return {}
    transformers = require("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
        names = config.architectures or ["AutoModel"]
        with torch.device("meta"):
            model = getattr(transformers, names[0])(config)
        mapping = require("transformers.conversion_mapping").get_model_conversion_mapping(model)
        loading = require("transformers.core_model_loading")
    except Exception:  # of another version, or a model of the user's own: names stay what they are
        return {}
    renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
    return {renamed(path, renamings)[0]: path for path in paths}
