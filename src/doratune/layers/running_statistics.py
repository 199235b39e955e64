"""Normalisations of a frozen base that would learn all the same: running statistics follow the data in training mode.

They belong to the base and are in no adapter's file, so they stay as they are while adapters are attached. Their
modules are held in evaluation mode, which also has training see the statistics that evaluation will.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


class _Held:
    """Stands in the place of a module's ``train``: remembers the mode that was asked for, and changes nothing."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.mode = module.training

    def __call__(self, mode: bool = True) -> nn.Module:
        self.mode = mode
        return self.module


def hold(module: nn.Module) -> None:
    """Keep a normalisation with running statistics in evaluation mode; other modules are left alone."""
    if isinstance(module, _NormBase) and module.track_running_stats and "train" not in module.__dict__:
        module.__dict__["train"] = _Held(module)
        module.training = False


def release(module: nn.Module) -> None:
    """Undo ``hold``: the module is in the mode that was last asked for."""
    if isinstance(module.__dict__.get("train"), _Held):
        module.training = module.__dict__.pop("train").mode
