"""An adapter on one layer: what was decided about it there, and its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from doratune.config import AdapterConfig
from doratune.layers.cache import ScaleCache
from doratune.layers.weights import is_dtensor


@dataclass
class LayerAdapter:
    """One adapter on one layer: its options there, and what was decided when it was attached."""

    config: AdapterConfig
    rank: int
    scale_text: str
    trainable: bool = True
    eight_bit: bool = False
    dense_norm: bool = False
    keep_output: bool = False

    @property
    def scale(self) -> float:
        """s. Kept as text: torch.compile takes a float that differs between layers for a symbol."""
        return float(self.scale_text)

    @scale.setter
    def scale(self, value: float) -> None:
        self.scale_text = repr(float(value))


class AdapterParameters(nn.ParameterDict):
    """A, B, m or bias of a layer's adapters by name.

    For each forward FSDP puts whole parameters in place of its parts: the same objects as in the step before, with the
    same version and perhaps in the same memory, so that a stamp cannot tell the two apart. Therefore every exchange
    clears what was computed.
    """

    def __init__(self, cache: ScaleCache) -> None:
        super().__init__()
        self.cache = cache
        self.gathered = False
        """FSDP has put whole parameters here for a forward; whatever is written to them is lost afterwards."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter):
            before = self._parameters.get(name)
            self.gathered = is_dtensor(before) and not is_dtensor(value)
            self.cache.clear_scale()
        if isinstance(value, Tensor) and "_is_replica" in self.__dict__:
            self._parameters[name] = value  # type: ignore[assignment]  # torch keeps replicas' tensors elsewhere
            return
        super().__setattr__(name, value)
