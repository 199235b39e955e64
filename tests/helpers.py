"""Helpers of many tests: errors in numbers, small models, snapshots of a model."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import doratune as dt
from doratune.targets import adapted_layers


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value; infinite where something is not finite."""
    found, expected = found.detach().double(), expected.detach().double()
    assert found.shape == expected.shape, f"expected shape {tuple(expected.shape)}, found {tuple(found.shape)}"
    if not torch.isfinite(found).all():
        return float("inf")
    if not expected.numel():
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def elementwise_error(found: Tensor, expected: Tensor) -> float:
    """Largest relative difference of any element."""
    found, expected = found.detach().double(), expected.detach().double()
    return float(((found - expected) / expected).abs().max())


def seed_generators(seed: int) -> None:
    """``torch.manual_seed`` for devices in use; for all others that one notes the whole call stack each time."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def one_layer(model: nn.Module) -> Any:
    """The only adapted layer of a model."""
    (layer,) = adapted_layers(model).values()
    return layer


@torch.no_grad()
def move(model: nn.Module, amount: float = 0.2, seed: int = 1, name: str | None = None) -> nn.Module:
    """Move every parameter of an adapter, the active one, in place, as training would."""
    generator = torch.Generator().manual_seed(seed)

    def noise(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, device="cpu").to(t)

    for layer in adapted_layers(model).values():
        chosen = name or layer.active
        if chosen is None or chosen not in layer.adapters:
            continue
        for group in (layer.lora_A, layer.lora_B):
            if chosen in group:
                group[chosen].add_(amount * noise(group[chosen]))
        if chosen in layer.magnitude:
            layer.magnitude[chosen].mul_(1 + amount * noise(layer.magnitude[chosen]))
        if chosen in layer.adapter_bias:
            layer.adapter_bias[chosen].add_(amount * noise(layer.adapter_bias[chosen]))
    return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that must not change when nothing is meant to change: modules, tensors, flags, hooks."""
    return {
        "modules": [(name, id(m), type(m), m.training) for name, m in model.named_modules()],
        "parameters": [(n, id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)],
        "values": {n: t.clone() for n, t in model.state_dict().items()},
        "hooks": [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()],
        "extra": sorted(k for k in model.__dict__ if k.startswith("_doratune")),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Two snapshots are the same, tensors bit for bit."""
    for key in ("modules", "parameters", "hooks", "extra"):
        assert before[key] == after[key]
    assert before["values"].keys() == after["values"].keys()
    for name, value in before["values"].items():
        assert value.dtype == after["values"][name].dtype
        assert torch.equal(value, after["values"][name]), f"{name} has changed"


class Block(nn.Module):
    """An attention-like block: four projections and an MLP, nothing clever."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.q_proj(x)) * self.v_proj(x)
        return x + self.down(torch.relu(self.up(self.norm(x))))


class TinyModel(nn.Module):
    """Embedding, two blocks, output head; looks like a language model to ``all-linear``."""

    def __init__(self, vocabulary: int = 13, width: int = 16, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([Block(width), Block(width)])
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def tiny(seed: int = 0, **options: Any) -> TinyModel:
    """A ``TinyModel`` with fixed weights."""
    seed_generators(seed)
    return TinyModel(**options)


def ids(seed: int = 0, shape: tuple[int, ...] = (3, 5), vocabulary: int = 13) -> Tensor:
    """Fixed token ids."""
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def output(model: nn.Module, x: Tensor) -> Tensor:
    """The model's output in evaluation; every module's mode is afterwards what it was."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        return model(x).clone()
    finally:
        model.train()
        for module, training in modes:
            module.training = training


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Gradients of everything that trains, by name."""
    for p in model.parameters():
        p.grad = None
    loss().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for p in model.parameters():
        p.grad = None
    return found


def tiny_llama(**options: Any) -> Any:
    """A random Llama of transformers, small enough for a unit test."""
    from transformers import LlamaConfig, LlamaForCausalLM

    seed_generators(0)
    settings = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **options})).eval()


DORA = dt.AdapterConfig(rank=4, alpha=8)
LORA = dt.AdapterConfig(rank=4, alpha=8, method="lora")


def replicas(model: nn.Module, monkeypatch: Any) -> list[nn.Module]:
    """Two copies as ``nn.DataParallel`` makes them for two GPUs, but on the CPU."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")

    def copies(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[t.detach().clone() if detach else t.clone() for t in tensors] for _ in devices]

    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, optional: device)
    return replicate.replicate(model, [0, 1], not torch.is_grad_enabled())


def enable_checkpointing(model: Any, reentrant: bool = False) -> None:
    """Have a model of transformers compute activations again; before 5.23 it called that by another name."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
