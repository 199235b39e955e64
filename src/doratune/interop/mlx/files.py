"""What the two files of an mlx-lm adapter's folder say, not yet compared with a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from doratune.config import Method
from doratune.errors import AdapterError, shown
from doratune.files import CONFIG, MLX_WEIGHTS, is_mlx, read_any_config, read_weights
from doratune.peft_fields import MOST_RANKS


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as it stands in its folder."""

    base: str | None
    """The model that it was trained on."""
    method: Method
    rank: int
    scale: float
    dropout: float
    keys: frozenset[str] | None
    """Names of the adapted modules, inside a block or in the whole model; None: all linear layers of the blocks."""
    num_layers: int
    """Blocks that are adapted, counted from the last one; 0 or less: all."""
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> AdapterFiles:
        """Read a folder without a model.

        Raises:
            AdapterError: if it cannot be read at all, or naming every option that is missing or wrong.
        """
        raw = read_any_config(folder)
        if not is_mlx(raw):
            raise AdapterError(
                f"{folder / CONFIG} is not mlx-lm's: it has neither fine_tune_type nor lora_parameters; "
                "doratune.load_adapter reads PEFT's"
            )
        if raw.get("fine_tune_type") == "full":
            raise AdapterError(f"{folder}: fine_tune_type is 'full': it holds weights of the model, and no adapter")
        parameters = raw.get("lora_parameters")
        inner = {"dropout": 0.0, "keys": None, **parameters} if isinstance(parameters, dict) else {}
        outer = {"fine_tune_type": "lora", **raw, "lora_parameters": inner or parameters}
        problems = [
            f"{field}: expected {expected}, found {shown(values.get(field))}"
            for values, fields in ((outer, OUTER), (inner, INNER if inner else {}))
            for field, (fits, expected) in fields.items()
            if not fits(values.get(field))
        ]
        if problems:
            raise AdapterError.of(str(folder / CONFIG), problems)
        tensors, _ = read_weights(folder, MLX_WEIGHTS)
        base = raw.get("model")
        return cls(
            base if isinstance(base, str) and base else None,
            outer["fine_tune_type"],
            inner["rank"],
            float(inner["scale"]),
            float(inner["dropout"]),
            None if inner["keys"] is None else frozenset(inner["keys"]),
            outer["num_layers"],
            tensors,
        )


def _is_number(value: Any, least: float, below: float) -> bool:
    return type(value) in (int, float) and least <= value < below


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


OUTER: dict[str, tuple[Callable[[Any], bool], str]] = {
    "fine_tune_type": (lambda v: v in ("lora", "dora"), "'lora' or 'dora'"),
    "num_layers": (lambda v: type(v) is int, "a whole number"),
    "lora_parameters": (lambda v: isinstance(v, dict), "rank, scale, dropout and keys"),
}
"""What the options have to be; mlx-lm reads no others."""
INNER: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rank": (lambda v: type(v) is int and 0 < v <= MOST_RANKS, f"a whole number from 1 to {MOST_RANKS}"),
    "scale": (lambda v: _is_number(v, 1e-30, 1e30), "a finite number above 0"),
    "dropout": (lambda v: _is_number(v, 0, 1), "at least 0 and below 1"),
    "keys": (_are_names, "names of modules"),
}
"""What those in ``lora_parameters`` have to be."""
