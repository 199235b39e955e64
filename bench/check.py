"""Is a contestant right? Its output and gradients are compared with a plain reference that computes W' in full."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench.bases import dense_weight
from bench.contestants import Contestant, Setting, share
from bench.tasks import Task
from doratune.ops.reference import dora_weight, lora_weight
from doratune.study.moved import MovedAdapter

REFERENCE_IN_FLOAT32 = 300e6
"""Parameters up to which the reference computes in float32; in larger models, as the base."""


class ReferenceLinear(nn.Module):
    """A linear layer whose adapted weight is written out in full."""

    def __init__(self, W: Tensor, bias: Tensor | None, values: MovedAdapter, setting: Setting, how: Contestant) -> None:
        super().__init__()
        self.W, self.bias, self.scale = W, bias, setting.scale
        self.method, self.norm_gradient = how.method, how.norm_gradient
        self.A, self.B, self.m = (nn.Parameter(t.clone()) for t in (values.A, values.B, values.m))

    def weight(self, W: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
        W = W.float()
        if self.method == "lora":
            return lora_weight(W, A, B, self.scale)
        return dora_weight(W, A, B, m, self.scale, self.norm_gradient)

    def forward(self, x: Tensor) -> Tensor:
        # Checkpointed: a large model's weights in float32 would not fit beside it.
        weight = checkpoint(self.weight, self.W, self.A, self.B, self.m, use_reentrant=False)
        return F.linear(x, weight.to(x.dtype), self.bias)


def reference(base: nn.Module, values: dict[str, MovedAdapter], setting: Setting, like: Contestant) -> Contestant:
    """A contestant that computes ``like``'s method plainly, with the values of round 0."""
    model = share(base)
    small = sum(p.numel() for p in base.parameters()) <= REFERENCE_IN_FLOAT32
    adapters = {}
    for path in setting.paths:
        linear = base.get_submodule(path)
        bias = None if linear.bias is None else linear.bias.float() if small else linear.bias
        layer = ReferenceLinear(dense_weight(linear), bias, values[path].at(0), setting, like)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
        adapters[path] = (layer.A, layer.B, layer.m if like.method == "dora" else None)
    if small:
        model = _in_float32(model)
    return Contestant("reference", model, like.method, adapters)


def _in_float32(model: nn.Module) -> nn.Module:
    """Base tensors are shared with the contestants, so they are replaced and not converted."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dtype in (torch.bfloat16, torch.float16):
                module._parameters[name] = nn.Parameter(parameter.float(), requires_grad=False)
    model.register_forward_pre_hook(_inputs_in_float32, with_kwargs=True)
    return model


def _inputs_in_float32(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    def cast(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


@dataclass
class Errors:
    """Relative errors, in the Euclidean norm over all layers; of the tensors that the method has."""

    output: float
    inputs: float = 0.0
    A: float = 0.0
    B: float = 0.0
    m: float = 0.0

    def within(self, tolerance: float) -> bool:
        return all(error <= tolerance for error in asdict(self).values())


@dataclass
class Observation:
    """What one step computes."""

    output: Tensor
    inputs: Tensor
    gradients: dict[str, list[Tensor]]


def observe(task: Task, contestant: Contestant, training: bool) -> Observation:
    """Output, and with ``training`` gradients."""
    # Dropout is random: such a contestant is checked without it.
    contestant.model.train(training and not contestant.dropout)
    task.inputs.grad = None
    with torch.no_grad():
        output = task.output(contestant.model).float()
    if not training:
        return Observation(output, torch.zeros(0), {})
    task.backward(task.forward(contestant.model))
    gradients = {part: [t.float() for t in tensors] for part, tensors in contestant.gradients().items()}
    assert task.inputs.grad is not None
    seen = Observation(output, task.inputs.grad.float(), gradients)
    contestant.model.zero_grad(set_to_none=True)
    return seen


def errors(found: Observation, expected: Observation) -> Errors:
    """How far one observation is from another."""
    parts: dict[str, Any] = {
        part: _distance(found.gradients[part], expected.gradients[part]) for part in expected.gradients
    }
    return Errors(_distance([found.output], [expected.output]), _distance([found.inputs], [expected.inputs]), **parts)


def _distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """``|found - expected| / |expected|``; infinite where something is not finite."""
    difference = math.sqrt(sum(float((f - e).square().sum()) for f, e in zip(found, expected, strict=True)))
    size = math.sqrt(sum(float(e.square().sum()) for e in expected))
    return difference / max(size, 1e-30) if math.isfinite(difference) else math.inf
