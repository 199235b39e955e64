"""Texts that are longer than a base model has positions for, found before its weights are loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch

from doratune.errors import AdapterError
from doratune.extras import require
from doratune.train.config import TrainConfig
from doratune.train.gather import Say
from doratune.train.models import LOADERS, context_length, load_config


def check_length(config: TrainConfig, longest: int, say: Say) -> None:
    """A model with a table of positions takes no longer texts; others may, and are told of it.

    Args:
        config: names the model.
        longest: tokens of the longest text.
        say: told where the model can, but was not pretrained with so many.

    Raises:
        AdapterError: if there are more tokens than positions.
    """
    own = load_config(config.model)
    made_for = context_length(own) or 0
    if made_for <= 0:
        return
    rows = None if getattr(own.get_text_config(), "rope_parameters", None) else _table(own, config.task)
    most = made_for if rows is None else min(made_for, rows)
    if longest <= most:
        return
    if rows is not None:
        raise AdapterError(
            f"max_length is {config.max_length}, and there are texts of {longest} tokens, but model {config.model} has "
            f"positions for {most}; use --max-length {most} or less"
        )
    say(f"there are texts of {longest} tokens (max_length); {config.model} was made for {most}")


def longest_of(parts: Iterable[Any]) -> int:
    """Tokens of the longest example of data sets, some of which may be absent or empty."""
    compute = require("pyarrow.compute")
    lengths = (compute.list_value_length(part.data.column("input_ids")) for part in parts if part is not None)
    return max((compute.max(one).as_py() or 0 for one in lengths), default=0)


def _table(config: Any, task: str) -> int | None:
    """``rows_of_table`` of the model that a config describes, without its weights."""
    transformers = require("transformers")
    loader = getattr(transformers, LOADERS[task])
    if type(config) not in loader._model_mapping:
        return None
    with torch.device("meta"):
        return rows_of_table(loader.from_config(copy.deepcopy(config)))


def rows_of_table(model: torch.nn.Module) -> int | None:
    """Tokens that a model's learned table of positions has rows for; None: it has no such table."""
    for name, module in model.named_modules():
        own = name.rpartition(".")[2]
        if isinstance(module, torch.nn.Embedding) and ("position" in own or own == "wpe"):
            # RoBERTa and its kin count positions from the row after that of padding.
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - unused
    return None
