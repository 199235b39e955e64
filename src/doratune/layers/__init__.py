"""Kinds of base layers. A new kind is one file here and one line in ``KINDS``."""

from __future__ import annotations

import torch
from torch import nn

from doratune.layers.adapted import AdaptedLayer
from doratune.layers.attention import AttentionProjection
from doratune.layers.conv import Convolution
from doratune.layers.embedding import Embedding
from doratune.layers.experts import Experts
from doratune.layers.holder import AdapterHolder, StandIn
from doratune.layers.host import Host, Part
from doratune.layers.kind import Kind, Options
from doratune.layers.linear import Linear
from doratune.layers.saved import SavedModule

KINDS: tuple[Kind, ...] = (Linear(), Embedding(), Convolution(), AttentionProjection(), Experts())

__all__ = [
    "KINDS",
    "AdaptedLayer",
    "AdapterHolder",
    "Host",
    "Kind",
    "Options",
    "Part",
    "SavedModule",
    "StandIn",
    "kind_of",
    "parts_of",
]


def kind_of(module: nn.Module) -> Kind | None:
    """The kind that serves a module, or None."""
    for kind in KINDS:  # no generator: torch.compile before 2.9 cannot look into one
        if kind.serves(module):
            return kind
    return None


def parts_of(module: nn.Module) -> dict[str, nn.Module]:
    """Weights of a module that can be adapted as if they were layers, by name."""
    if isinstance(module, torch.jit.ScriptModule):  # compiled, with parameters that are no dictionary's
        return {}
    return {name: part for kind in KINDS for name, part in kind.parts(module).items()}
