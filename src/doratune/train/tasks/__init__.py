"""What can be learnt: one file a task, each with ``problems(config)`` and ``prepare(config, say)``."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {"text-generation": "text", "text-classification": "classification", "image-classification": "image"}


def task_of(name: str) -> Any:
    """The module of a task."""
    return importlib.import_module(f"{__name__}.{_HOMES[name]}")
