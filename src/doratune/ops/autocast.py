"""Autocast, which would round what norms and small products are to tell: switched off, or as it was in the forward."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on for a device; the meta device has none, and torch would raise."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which no product is cast to another dtype."""
    if is_autocast(device):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def autocast_of_now(device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Makes contexts with autocast as it is now. In a backward pass, which computes some things again, it is off."""
    if not is_autocast(device):
        return functools.partial(without_autocast, device)
    return functools.partial(torch.autocast, device.type, torch.get_autocast_dtype(device.type))
