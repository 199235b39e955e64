"""How a base model is loaded to be used: as asked, else as in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from doratune.errors import AdapterError
from doratune.train.checks import quantize_problems
from doratune.train.choices import Quantize
from doratune.train.information import Information
from doratune.train.models import choose_dtype
from doratune.train.placement import quantized

AUTO = "auto"
QuantizeToUse = Quantize | Literal["auto"] | None
"""A kind of ``doratune train``; auto: as in training; None: full precision."""
MERGED = "trained with --quantize {}; merged into the base in full precision, which is not exactly the same model"
"""Said of an adapter that is put into the weights."""


@dataclass(frozen=True)
class Loading:
    """How it is done."""

    dtype: str
    """Of the weights; auto: by what the machine has."""
    quantize: str | None
    """A kind of ``doratune train``."""
    double_quant: bool
    told: str | None
    """What of this comes from the training and is not the default, in words."""

    @classmethod
    def choose(
        cls, noted: Mapping[str, Information], dtype: str = AUTO, quantize: str | None = AUTO, merged: bool = False
    ) -> Loading:
        """Take what is asked, and where that is "auto", what was noted.

        Args:
            noted: what was noted in training, by the names of all that share the base.
            dtype: of the weights.
            quantize: a kind of ``doratune train``; None: full precision.
            merged: whether an adapter is to be put into the weights, which needs them in full precision.

        Raises:
            AdapterError: if they were trained in different ways, or what loads the base so is not installed.
        """
        problems: list[str] = []
        flags: list[str] = []
        told: list[str] = []
        if dtype == AUTO:
            given = {name: about.dtype for name, about in noted.items() if about.dtype != AUTO}
            dtype = _agreed("dtype", given, problems) or AUTO
            if dtype == "float16" and not torch.cuda.is_available():  # which it needs
                dtype = AUTO
            if dtype != AUTO:
                flags.append(f"--dtype {dtype}")
        if quantize == AUTO:
            quantize = _agreed("quantize", {name: about.quantize for name, about in noted.items()}, problems)
            if quantize and merged:
                told.append(MERGED.format(quantize))
                quantize = None
            elif quantize:
                problems += (f"{line}, or give --quantize none" for line in quantize_problems(quantize))
                flags.append(f"--quantize {quantize}")
        if problems:
            raise AdapterError.of("the base cannot be loaded as in training", problems)
        if flags:
            whole = " (--quantize none: in full precision)" if any("quantize" in flag for flag in flags) else ""
            told.append(f"the base is loaded as in training: {' '.join(flags)}{whole}")
        double = all(about.double_quant for about in noted.values())
        return cls(dtype, quantize, double, "; ".join(told) or None)

    def options(self, classifier: bool = False) -> tuple[torch.dtype, dict[str, Any]]:
        """The dtype of the weights, and more arguments of transformers' ``from_pretrained``, as ``quantized`` has them.

        Raises:
            AdapterError: if there is no such kind or dtype, or this machine cannot compute in it.
        """
        dtype = choose_dtype(self.dtype)
        return dtype, quantized(self.quantize, dtype, self.double_quant, classifier)


def _agreed(option: str, values: Mapping[str, str | None], problems: list[str]) -> str | None:
    """The value that all have; where they differ, that is a problem."""
    if len(set(values.values())) > 1:
        listed = ", ".join(f"{name} {value or 'none'}" for name, value in values.items())
        problems.append(f"{option}: {listed}; say which with --{option}")
    return next(iter(values.values()), None)
