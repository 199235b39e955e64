"""The table of the conformance suite. A new kind of layer is one entry in ``CASES``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import doratune as dt
from doratune.ops import reference
from helpers import move, one_layer, seed_generators

VOCABULARY = 17


@dataclass(frozen=True)
class Case:
    """One way of being a base layer, and what it computes, said independently of doratune.

    Everything is in terms of W as ``[out, in]`` with one magnitude per row, A ``[r, in]`` and B ``[out, r]``;
    convolutions have in = channels x taps.
    """

    name: str
    make: Callable[[], nn.Module]
    """A base layer with random weights, float32."""
    inputs: Callable[[], Tensor]
    """A batch for it, float32 or integer."""
    weight: Callable[[nn.Module], Tensor]
    """W of a base, ``[out, in]``."""
    dense: Callable[[nn.Module, Tensor, Tensor, Tensor | None], Tensor]
    """``dense(base, x, W, b)``: what a layer of this kind computes with weight ``[out, in]`` and bias, or without."""
    bias: bool = False
    """The base has a bias."""
    differentiable: bool = True
    """The input can have a gradient."""
    drops: bool = True
    """Dropout applies to the input of the low-rank path."""
    path: str = ""
    """What ``explain`` says."""
    blocked_column: int | None = None
    """A column of A that gets no gradient by being looked up: the padding token's."""
    tolerance: float = 1.0
    """Times the tolerance of the precision; for bases that are coarser by themselves."""

    def __repr__(self) -> str:
        return self.name


class PlainSubclass(nn.Linear):
    """As transformers, timm and others derive theirs: no forward of its own."""


class OwnForward(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: the table's rows times a constant."""

    def __init__(self, *args: Any, embed_scale: float) -> None:
        super().__init__(*args, padding_idx=0)
        self.register_buffer("embed_scale", torch.tensor(embed_scale), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale.to(self.weight.dtype)


def copy_hook(module: nn.Module, inputs: Any, result: Tensor) -> Tensor:
    """A hook that changes nothing; a function of a module, so that pickle finds it."""
    return result.clone()


def _hooked() -> nn.Module:
    base = nn.Linear(12, 20)
    base.register_forward_hook(copy_hook)
    return base


def _conv1d() -> nn.Module:
    base = Conv1D(20, 12)
    nn.init.normal_(base.weight, std=0.3)
    nn.init.normal_(base.bias)
    return base


def _weight(base: nn.Module) -> Tensor:
    return base.weight.detach()


def _transposed(base: nn.Module) -> Tensor:
    return base.weight.detach().T


def _linear(base: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    return F.linear(x, W, b)


def _lookup(base: nn.Module, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    return F.embedding(x, W.T) * float(getattr(base, "embed_scale", 1.0))


def _tokens() -> Tensor:
    return torch.arange(24).reshape(3, 8) % VOCABULARY  # every token, some twice, padding among them


FUSED, OVER_OUTPUT = "dense, fused input gradient", "over the base's output"


def linear_case(name: str, make: Callable[[], nn.Module], *, columns: int = 12, **options: Any) -> Case:
    """A case of a layer that multiplies the last dimension."""
    return Case(
        name,
        make,
        **{"inputs": lambda: torch.randn(3, 5, columns), "weight": _weight, "dense": _linear, "bias": True} | options,
    )


def embedding_case(name: str, make: Callable[[], nn.Module], padding: int | None = None) -> Case:
    """A case of a layer that looks up rows of a table."""
    fixed = {"differentiable": False, "drops": False, "path": OVER_OUTPUT, "blocked_column": padding}
    return Case(name, make, _tokens, _transposed, _lookup, **fixed)


def _flat(base: nn.Module) -> Tensor:
    return base.weight.detach().flatten(1)


def _convolve(base: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    return base._conv_forward(x, W.view(base.weight.shape), b)


def conv_case(name: str, make: Callable[[], nn.Module], shape: tuple[int, ...], bias: bool = True) -> Case:
    """A case of a convolution, for inputs of ``shape``."""
    return Case(name, make, lambda: torch.randn(shape), _flat, _convolve, bias, path=OVER_OUTPUT)


CASES = (
    linear_case("linear", lambda: nn.Linear(12, 20), path=FUSED),
    linear_case("linear-no-bias", lambda: nn.Linear(12, 20, bias=False), bias=False, path=FUSED),
    linear_case("linear-square", lambda: nn.Linear(12, 12), path=FUSED),
    linear_case("linear-narrow", lambda: nn.Linear(20, 7), columns=20, path=FUSED),
    linear_case("linear-subclass", lambda: PlainSubclass(12, 20), path=FUSED),
    linear_case("linear-own-forward", lambda: OwnForward(12, 20), path=OVER_OUTPUT),
    linear_case("linear-hooked", _hooked, path=OVER_OUTPUT),
    linear_case("conv1d-transformers", _conv1d, weight=_transposed, path=FUSED),
    embedding_case("embedding", lambda: nn.Embedding(VOCABULARY, 10)),
    embedding_case("embedding-padding", lambda: nn.Embedding(VOCABULARY, 10, padding_idx=0), padding=0),
    embedding_case("embedding-scaled", lambda: ScaledEmbedding(VOCABULARY, 10, embed_scale=3.0), padding=0),
    conv_case("conv1d", lambda: nn.Conv1d(3, 6, 3, stride=2, padding=1), (3, 3, 9)),
    conv_case("conv2d", lambda: nn.Conv2d(3, 5, 3), (2, 3, 6, 7)),
    conv_case(
        "conv2d-same", lambda: nn.Conv2d(3, 5, (3, 2), padding="same", dilation=2, bias=False), (2, 3, 6, 7), False
    ),
    conv_case("conv2d-circular", lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"), (2, 3, 6, 7)),
    conv_case("conv2d-grouped", lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 7)),
    conv_case("conv2d-depthwise", lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (2, 4, 6, 7)),
    conv_case("conv3d", lambda: nn.Conv3d(2, 5, 2, stride=(1, 2, 1)), (2, 2, 3, 4, 5)),
)


METHODS: dict[str, dict[str, Any]] = {
    "dora": {},
    "lora": {"method": "lora"},
    "magnitude": {"rank": 0},
    "dora-exact": {"norm_gradient": "exact"},
}


def autocast() -> torch.autocast:
    """bfloat16 autocast of the device that tests run on."""
    return torch.autocast(torch.get_default_device().type, torch.bfloat16)


@dataclass(frozen=True)
class Precision:
    """The dtype of base and input, and how close results have to be to float64."""

    name: str
    dtype: torch.dtype
    tolerance: float
    scale_tolerance: float
    """For g itself: the output's rounding would hide a missing norm. Rounding errors
    of these small layers do not average out; ``tests/ops`` holds the bound for layers of a usual size."""
    autocast: bool = False

    def __repr__(self) -> str:
        return self.name

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast where this precision means it."""
        return autocast() if self.autocast else contextlib.nullcontext()


FLOAT32 = Precision("float32", torch.float32, 1e-5, 2e-6)
AUTOCAST = Precision("autocast", torch.float32, 2e-2, 2e-6, autocast=True)
PRECISIONS = (
    FLOAT32,
    Precision("bfloat16", torch.bfloat16, 2e-2, 4e-3),
    Precision("float16", torch.float16, 3e-3, 1e-3),
    AUTOCAST,
)


class Host(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@dataclass
class Setup:
    """A model of one adapted layer, an input, and what the reference says about them."""

    case: Case
    precision: Precision
    model: Host
    x: Tensor

    @property
    def layer(self) -> Any:
        """The adapted layer."""
        return one_layer(self.model)

    def run(self, x: Tensor | None = None, model: nn.Module | None = None) -> Tensor:
        """The model's output under the precision's autocast."""
        with self.precision.context():
            return (self.model if model is None else model)(self.x if x is None else x)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The active adapter's parameters: A, B, m, b, those it has."""
        layer = self.layer
        groups = {"A": layer.lora_A, "B": layer.lora_B, "m": layer.magnitude, "b": layer.adapter_bias}
        return {part: group[layer.active] for part, group in groups.items() if layer.active in group}

    def reference(self, dropped: Tensor | None = None) -> Reference:
        """The definition, in float64, at the present values."""
        return Reference(self, dropped)


class Reference:
    """An adapted layer in float64 through ``ops/reference.py``, with autograd's gradients."""

    def __init__(self, setup: Setup, dropped: Tensor | None = None) -> None:
        layer, case = setup.layer, setup.case
        base, adapter = layer.base_layer, layer.adapters[layer.active]
        W = case.weight(base).double()
        self.leaves = {part: p.detach().double().requires_grad_() for part, p in setup.parameters().items()}
        x = setup.x
        if case.differentiable:
            x = self.leaves["x"] = x.detach().double().requires_grad_()
        A = self.leaves.get("A", torch.zeros(1, W.shape[1], dtype=torch.float64))
        B = self.leaves.get("B", torch.zeros(W.shape[0], 1, dtype=torch.float64))
        b = self.leaves.get("b")
        if b is None and case.bias:
            b = base.bias.detach().double()
        self.g = torch.ones(W.shape[0], dtype=torch.float64)
        if "m" in self.leaves:
            self.g = reference.dora_scale(W, A, B, self.leaves["m"], adapter.scale, adapter.config.norm_gradient)
        looked_up = A
        if case.blocked_column is not None:
            looked_up = A.clone()
            looked_up[:, case.blocked_column] = A[:, case.blocked_column].detach()
        self.weight = self.g[:, None] * reference.lora_weight(W, looked_up, B, adapter.scale)
        if dropped is None:
            self.y = case.dense(base, x, self.weight, b)
        else:
            low = x * dropped.double()
            change = self.g[:, None] * (adapter.scale * (B @ A))
            self.y = case.dense(base, x, self.g[:, None] * W, b) + case.dense(base, low, change, None)

    def gradients(self, dy: Tensor) -> dict[str, Tensor]:
        """Gradients of all leaves."""
        found = torch.autograd.grad(self.y, list(self.leaves.values()), dy.double())
        return dict(zip(self.leaves, found, strict=True))


def setup(
    case: Case, method: str = "dora", precision: Precision = FLOAT32, *, moved: bool = True, **options: Any
) -> Setup:
    """A fresh model of the case with one adapter, moved unless told otherwise."""
    seed_generators(0)
    model = Host(case.make()).to(precision.dtype)
    x = case.inputs()
    if x.is_floating_point():
        x = x.to(precision.dtype)
    config = dt.AdapterConfig(**{"rank": 4, "alpha": 6, "targets": ["layer"]} | METHODS[method] | options)
    dt.attach(model, config)
    if moved:
        move(model)
        if options.get("norm_gradient") is None and method != "lora":
            # Some rows of the wrong sign and of very different size.
            with torch.no_grad():
                m = one_layer(model).magnitude["default"]
                m[0] *= -1
                m[1] *= 5
    return Setup(case, precision, model, x)


def found_gradients(s: Setup, dy: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """The gradients that the layer itself finds, x's among them."""
    x = s.x.detach().clone()
    if s.case.differentiable:
        x.requires_grad_()
    for p in s.model.parameters():
        p.grad = None
    y = (s.run if run is None else run)(x)
    y.backward(dy.to(y.dtype))
    grads = {part: p.grad for part, p in s.parameters().items()}
    if s.case.differentiable:
        grads["x"] = x.grad
    missing = [part for part, grad in grads.items() if grad is None]
    assert not missing, f"no gradient for {missing}"
    for p in s.model.parameters():
        p.grad = None
    return grads


def upstream(y: Tensor) -> Tensor:
    """A fixed gradient for y, of numbers that every dtype holds exactly."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(-4, 5, y.shape, generator=generator, device="cpu").to(y.device, torch.float32) / 4
