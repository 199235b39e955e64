"""Where a model computes, and what to say when that is too small."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from doratune.errors import AdapterError


def to_device(model: Any) -> Any:
    """To the GPU if there is one; a quantised model stays where it was loaded.

    Raises:
        AdapterError: if it does not fit.
    """
    if getattr(model, "is_quantized", False):
        return model
    with explaining_memory("the model does not fit; try dtype bfloat16, or free the GPU of other programs"):
        if torch.cuda.is_available():
            return model.to("cuda")
        return model.to("mps") if torch.backends.mps.is_available() else model


@contextlib.contextmanager
def explaining_memory(advice: str) -> Iterator[None]:
    """Turn an error of short memory into one that says what to do.

    Raises:
        AdapterError: instead of torch's.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise AdapterError(f"out of memory; {advice}") from error
