"""What a kind of base layer has to say about itself: one file per kind fills this in."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from doratune.config import AdapterConfig
from doratune.layers.cache import ScaleCache
from doratune.layers.holder import shallow_copy
from doratune.layers.weights import WeightRows
from doratune.ops.once import by_hand


def outputs_are_overwritten() -> bool:
    """Whether Liger's kernels may run: they rotate q and k in place by raw pointers, which no version counter shows."""
    return "liger_kernel" in sys.modules  # asked in each forward: Trainer may load it after an adapter is attached


class Options(NamedTuple):
    """How an adapted layer's forward is to run; everything that is not a tensor of the adapter or its scale."""

    cache: ScaleCache
    dropout: float = 0.0
    """Probability; 0 in evaluation."""
    norm_gradient: str = "detached"
    dense_norm: bool = False
    """Compute n from dense tiles (near cancellation) instead of the factored form."""
    keep_output: bool = False
    """For the magnitude's gradient keep the layer's output instead of a tensor of its own."""
    eight_bit: bool = False
    """For the magnitude's gradient keep a tensor of its own, rounded to 8 bits."""
    reuse_scale: bool = False
    """g may be remembered between calls (evaluation without gradients)."""
    reuse_norm: bool = False
    """n may be remembered until A, B or W change."""
    bias: Tensor | None = None
    """The adapter's own bias, in place of the base's."""
    dropout_on_base: bool = False
    """PEFT's convention: dropout also acts on ``(g - 1) W x``, what the magnitude adds to the base's output."""
    rows: WeightRows | None = None
    """This process's part of W, where W lies on several processes; else None."""

    def keep(self) -> str:
        """What ``scale_rows`` is to keep; no property: torch.compile before 2.9 does not know those of named tuples."""
        if self.eight_bit:
            return "8-bit"
        # The compiler sees for itself what a kernel overwrites.
        overwritten = not torch.compiler.is_compiling() and outputs_are_overwritten()
        return "output" if self.keep_output and not overwritten else "input"

    def row_scale(self, rows: WeightRows, A: Tensor | None, B: Tensor | None, m: Tensor, scale: float) -> Tensor:
        """``g = m / n``, float32 ``[out]``, as these options say."""
        return self.cache.row_scale(
            rows, A, B, m, scale, self.norm_gradient, self.dense_norm, self.reuse_scale, self.reuse_norm
        )

    def in_one_node(self) -> bool:
        """Whether ``ops/dense.py`` serves: not for an exact norm or a frozen g, nor where a compiler sees the whole."""
        usual = self.norm_gradient == "detached" and self.cache.frozen is None
        return usual and by_hand() and not torch.compiler.is_compiling()

    def guards_output(self, g: Tensor) -> bool:
        """Whether y is kept for g's gradient and may be overwritten before the backward pass.

        Not in compiled code, which keeps a tensor of its own.
        """
        trains = g.requires_grad and torch.is_grad_enabled()
        return trains and self.keep() == "output" and not torch.compiler.is_compiling()


class Kind:
    """A kind of base layer. ``forward`` is the one function that computes it, native or under PEFT."""

    name: str
    file_names = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    """Names of A, B and m in PEFT's files."""

    def serves(self, base: nn.Module) -> bool:
        """True if this kind is responsible for the layer."""
        raise AssertionError(f"{type(self).__name__} must define serves")

    def parts(self, module: nn.Module) -> Mapping[str, nn.Module]:
        """Weights that a module computes with by itself and that this kind serves as layers, by name."""
        return {}

    def host(self, module: nn.Module) -> nn.Module | None:
        """What stands in the place of a module with such parts."""
        return None

    def refusal(self, base: nn.Module) -> str | None:
        """Why this layer cannot be adapted, or None."""
        return None

    def config_refusal(self, config: AdapterConfig) -> str | None:
        """Why this kind cannot take an adapter with these options, or None."""
        return None

    def rows(self, base: nn.Module) -> WeightRows:
        """W, ``[out, in]``."""
        raise AssertionError(f"{type(self).__name__} must define rows")

    def forward(
        self,
        base: nn.Module,
        x: Tensor,
        A: Tensor | None,
        B: Tensor | None,
        magnitude: Tensor | None,
        scale: float,
        options: Options,
    ) -> Tensor:
        """The adapted layer's output. No magnitude: LoRA. No A and B: magnitude only."""
        raise AssertionError(f"{type(self).__name__} must define forward")

    def explain(self, base: nn.Module) -> tuple[str, str]:
        """Which path the forward takes, and why not a faster one."""
        return "over the base's output", f"the {self.name} kind has one path"

    def init(self, A: Tensor, B: Tensor, how: str) -> None:
        """Start values, in place: B = 0, so that a new adapter changes nothing."""
        rank = B.shape[1]
        for part in A.split(rank):  # one, but where matrices lie under each other
            if how == "gaussian":
                nn.init.normal_(part, std=1 / rank)
            elif how == "orthogonal":
                nn.init.orthogonal_(part)
            else:
                nn.init.kaiming_uniform_(part, a=math.sqrt(5))
        nn.init.zeros_(B)

    def to_file(self, base: nn.Module, part: str, tensor: Tensor) -> Tensor:
        """A, B or m as PEFT's files hold it (``part`` is one of ``file_names``)."""
        return tensor

    def from_file(self, base: nn.Module, part: str, tensor: Tensor) -> Tensor:
        """The opposite of ``to_file``, for a tensor of the right shape."""
        return tensor

    def file_refusal(self, base: nn.Module, config: AdapterConfig) -> str | None:
        """Why an adapter with these options on this layer cannot be exchanged in PEFT's format, or None."""
        return None

    def merged_layer(self, base: nn.Module, merged: Tensor, bias: Tensor | None) -> nn.Module:
        """A plain layer with ``merged``, in the base's layout, as its weight, and ``bias``; the base stays as it is."""
        layer = shallow_copy(base)
        layer.weight = nn.Parameter(merged, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return layer

    def probe(self, base: nn.Module, generator: torch.Generator) -> Tensor:
        """A random input to compare merged with unmerged output, drawn on the CPU whatever torch's default is."""
        columns = self.rows(base).shape[1]
        weight: Tensor = base.weight  # type: ignore[assignment]
        return torch.randn(8, columns, generator=generator, device="cpu").to(weight.device, weight.dtype)
