"""Kinds of base layers. A new kind is one file here and one line in ``KINDS``."""

from __future__ import annotations

from torch import nn

from doratune.layers.adapted import AdaptedLayer
from doratune.layers.attention import AttentionHost, AttentionProjection
from doratune.layers.conv import Convolution
from doratune.layers.embedding import Embedding
from doratune.layers.holder import AdapterHolder, StandIn
from doratune.layers.kind import Kind, Options
from doratune.layers.linear import Linear
from doratune.layers.saved import SavedModule

KINDS: tuple[Kind, ...] = (Linear(), Embedding(), Convolution(), AttentionProjection())

__all__ = [
    "KINDS",
    "AdaptedLayer",
    "AdapterHolder",
    "AttentionHost",
    "Kind",
    "Options",
    "SavedModule",
    "StandIn",
    "kind_of",
]


def kind_of(module: nn.Module) -> Kind | None:
    """The kind that serves a module, or None."""
    for kind in KINDS:  # no generator: torch.compile before 2.9 cannot look into one
        if kind.serves(module):
            return kind
    return None
