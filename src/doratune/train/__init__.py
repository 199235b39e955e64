"""Training: the Trainer mixin for people with a script, and ``train`` for people with data.

Nothing here imports transformers before it is used; every name below is looked up on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from doratune.train.checkpoints import is_complete, last_checkpoint, restore_adapter
    from doratune.train.config import AdapterOptions, TrainConfig
    from doratune.train.information import Information
    from doratune.train.recipe import load_recipe
    from doratune.train.results import TrainResult
    from doratune.train.run import train
    from doratune.train.trainer import AdapterSFTTrainer, AdapterTrainer, AdapterTrainerMixin

_HOMES = {
    "AdapterOptions": "config",
    "AdapterSFTTrainer": "trainer",
    "AdapterTrainer": "trainer",
    "AdapterTrainerMixin": "trainer",
    "Information": "information",
    "TrainConfig": "config",
    "TrainResult": "results",
    "is_complete": "checkpoints",
    "last_checkpoint": "checkpoints",
    "load_recipe": "recipe",
    "restore_adapter": "checkpoints",
    "train": "run",
}

__all__ = [
    "AdapterOptions",
    "AdapterSFTTrainer",
    "AdapterTrainer",
    "AdapterTrainerMixin",
    "Information",
    "TrainConfig",
    "TrainResult",
    "is_complete",
    "last_checkpoint",
    "load_recipe",
    "restore_adapter",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
