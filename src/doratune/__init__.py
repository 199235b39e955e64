"""doratune: DoRA fine-tuning for PyTorch."""

import importlib
from types import ModuleType

from doratune.checkpoint import load_adapter, save_adapter
from doratune.config import AdapterConfig
from doratune.convert import Conversion, LayerFit, convert_to_lora
from doratune.errors import AdapterError
from doratune.merge import MergeCheck, merge, verify_merge
from doratune.model import (
    active_adapter,
    adapter_names,
    attach,
    base_model,
    delete_adapter,
    detach,
    disabled,
    frozen_scales,
    parameter_groups,
    set_adapter,
    trainable_parameters,
)
from doratune.summary import Summary, explain, summary

__version__ = "0.1.0"

__all__ = [
    "AdapterConfig",
    "AdapterError",
    "Conversion",
    "LayerFit",
    "MergeCheck",
    "Summary",
    "active_adapter",
    "adapter_names",
    "attach",
    "base_model",
    "convert_to_lora",
    "delete_adapter",
    "detach",
    "disabled",
    "explain",
    "frozen_scales",
    "load_adapter",
    "merge",
    "parameter_groups",
    "save_adapter",
    "set_adapter",
    "summary",
    "trainable_parameters",
    "verify_merge",
]


def __getattr__(name: str) -> ModuleType:
    """``doratune.peft``, ``doratune.train`` and the like, imported when they are first used."""
    if name in ("study", "train"):
        return importlib.import_module(f"doratune.{name}")
    if name in ("diffusers", "kohya", "mlx", "peft"):
        return importlib.import_module(f"doratune.interop.{name}")
    raise AttributeError(f"module 'doratune' has no attribute {name!r}")
