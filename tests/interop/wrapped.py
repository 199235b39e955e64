"""PEFT models of one layer or a tiny Llama, their adapters moved, and what a training step of theirs gives."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import doratune as dt
from helpers import tiny_llama


class One(nn.Module):
    """A model of a single layer, as PEFT wants it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@torch.no_grad()
def move(model: nn.Module, amount: float = 0.2, seed: int = 1) -> nn.Module:
    """Move A, B and m of all adapters, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator).to(p)
        if "lora_magnitude_vector" in name:
            p.mul_(1 + amount * noise)
        elif "lora_" in name:
            p.add_(amount * noise)
    return model


def peft_model(model: nn.Module, adapter_dtype: bool = True, **options: Any) -> Any:
    """A PEFT model with a moved DoRA adapter."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "use_dora": True, **options})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set")
        return move(get_peft_model(model, config, autocast_adapter_dtype=adapter_dtype))


def one(layer: nn.Module, dtype: torch.dtype = torch.float32, adapter_dtype: bool = True, **options: Any) -> Any:
    return peft_model(One(layer).to(dtype), adapter_dtype, target_modules=["layer"], **options)


def peft_llama(**options: Any) -> Any:
    return peft_model(tiny_llama(), **{"target_modules": "all-linear", **options})


def the_layer(model: Any) -> Any:
    return model.base_model.model.layer


def twin(model: Any, dropout: str = "peft") -> Any:
    """An accelerated copy; every layer of it is served."""
    copied = copy.deepcopy(model)
    handle = dt.peft.accelerate(copied, dropout=dropout)
    assert not handle.report.left, handle.report
    return copied


def trained(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients of one training step, always from the same seed."""
    model.train()
    x = x.clone()
    if x.is_floating_point():
        x.requires_grad_()
    for p in model.parameters():
        p.grad = None
    torch.manual_seed(7)
    y = model(x)
    y = y if isinstance(y, Tensor) else y.logits
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(8)).to(y.dtype))
    found = {"y": y.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    if x.grad is not None:
        found["x"] = x.grad
    return found


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What ``trained`` finds, and the output in evaluation."""
    return trained(model, x) | {"eval": evaluated(model, x)}


@torch.no_grad()
def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    """The output in evaluation."""
    y = model.eval()(x)
    return (y if isinstance(y, Tensor) else y.logits).clone()


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Distance of each part, relative to its norm; dtypes and names have to be the same."""
    assert found.keys() == expected.keys()
    result = {}
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, f"{name}: expected {value.dtype}, found {found[name].dtype}"
        distance = (found[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-12)
        result[name] = float(distance)
    return result


def assert_same_step(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    wrong = {n: d for n, d in difference(found, expected).items() if not d <= tolerance}
    assert not wrong, wrong
