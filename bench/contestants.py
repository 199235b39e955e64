"""Who takes part: each builder puts one method on a copy of the base that shares the base's weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import doratune as dt
from doratune.config import matches
from doratune.study.moved import MovedAdapter
from doratune.targets import adapted_layers

FROZEN = "frozen"
FULL = "full fine-tuning"
DORA, LORA = "doratune DoRA", "doratune LoRA"
EIGHT_BIT = "doratune DoRA, 8-bit outputs"
EIGHT_BIT_LAYERS = ("q_proj", "k_proj", "o_proj", "down_proj")
"""In a Llama nothing else keeps the outputs of these."""
EIGHT_BIT_TOLERANCE = 1e-2
"""Of the magnitude's gradient from an output rounded to 8 bits: a step is 1 / 126 of the row's largest value."""
ACCELERATED = ", accelerated"
"""Ends the name of what is PEFT's under ``dt.peft.accelerate``."""
DROPOUT = 0.05


@dataclass
class Contestant:
    """A model ready to run, and where its adapters' tensors are."""

    name: str
    model: nn.Module
    method: str  # frozen, full, lora or dora
    adapters: dict[str, tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=dict)  # A, B, m by path
    norm_gradient: str = "detached"
    dropout: float = 0.0
    tolerance: float = 0.0
    """Relative error that the method allows itself, where that is more than what the dtype does."""

    @torch.no_grad()
    def take(self, values: dict[str, MovedAdapter], round_number: int) -> None:
        """Set the adapters to the values of one round, and drop gradients."""
        for path, (A, B, m) in self.adapters.items():
            now = values[path].at(round_number)
            A.copy_(now.A)
            B.copy_(now.B)
            if m is not None:
                m.copy_(now.m.view_as(m))
        self.model.zero_grad(set_to_none=True)

    def gradients(self) -> dict[str, list[Tensor]]:
        """Gradients of A, B and m over all layers, in the order of the paths."""
        found: dict[str, list[Tensor]] = {"A": [], "B": [], "m": []}
        for tensors in self.adapters.values():
            for part, tensor in zip("ABm", tensors, strict=True):
                if tensor is not None:
                    found[part].append(tensor.grad.flatten())
        return {part: tensors for part, tensors in found.items() if tensors}


@dataclass(frozen=True)
class Setting:
    """What all adapters of a trial have in common."""

    paths: tuple[str, ...]  # of the layers to adapt
    rank: int = 16

    @property
    def alpha(self) -> float:
        return 2.0 * self.rank

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def share(base: nn.Module) -> Any:
    """A copy of the modules around the same tensors."""
    return copy.deepcopy(base, {id(t): t for t in (*base.parameters(), *base.buffers())})


def frozen(base: nn.Module, setting: Setting) -> Contestant:
    return Contestant(FROZEN, share(base), "frozen")


def full(base: nn.Module, setting: Setting) -> Contestant:
    model = copy.deepcopy(base)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return Contestant(FULL, model, "full")


def doratune(base: nn.Module, setting: Setting, *, name: str, method: str, **options: Any) -> Contestant:
    config = dt.AdapterConfig(method=method, rank=setting.rank, alpha=setting.alpha, targets=setting.paths, **options)
    model = dt.attach(share(base), config)
    layers = {}
    for path, layer in adapted_layers(model).items():
        m = layer.magnitude["default"] if method == "dora" else None
        layers[path] = (layer.lora_A["default"], layer.lora_B["default"], m)
    tolerance = EIGHT_BIT_TOLERANCE if config.eight_bit_outputs else 0.0
    return Contestant(name, model, method, layers, dropout=config.dropout, tolerance=tolerance)


def eight_bit(base: nn.Module, setting: Setting) -> Contestant:
    """8-bit outputs where nothing else keeps them: a single layer has none of these names."""
    paths = tuple(path for path in setting.paths if matches(path, EIGHT_BIT_LAYERS))
    return doratune(base, setting, name=EIGHT_BIT, method="dora", eight_bit_outputs=paths)


def peft(
    base: nn.Module, setting: Setting, *, name: str, method: str, float32: bool, dropout: float = 0.0
) -> Contestant:
    """PEFT; float32 adapters are its default."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=setting.rank,
        lora_alpha=setting.alpha,
        lora_dropout=dropout,
        target_modules=list(setting.paths),
        use_dora=method == "dora",
    )
    model = get_peft_model(share(base), config, autocast_adapter_dtype=float32)
    layers = {}
    for path in setting.paths:
        layer = model.base_model.model.get_submodule(path)
        m = layer.lora_magnitude_vector["default"].weight if method == "dora" else None
        layers[path] = (layer.lora_A["default"].weight, layer.lora_B["default"].weight, m)
    return Contestant(name, model, method, layers, dropout=dropout)


def accelerated(base: nn.Module, setting: Setting, **options: Any) -> Contestant:
    """PEFT's DoRA, served by doratune."""
    contestant = peft(base, setting, method="dora", **options)
    dt.peft.accelerate(contestant.model)
    return contestant


def lycoris(base: nn.Module, setting: Setting, *, name: str) -> Contestant:
    """LyCORIS' DoRA, magnitudes on the outputs; gradients flow through its norm."""
    from lycoris.modules.locon import LoConModule

    model = share(base)
    layers, modules = {}, nn.ModuleList()
    for path in setting.paths:
        linear = model.get_submodule(path)
        module = LoConModule(path, linear, 1.0, setting.rank, setting.alpha, weight_decompose=True, wd_on_out=True)
        module.to(linear.weight.device, linear.weight.dtype)
        module.apply_to()
        modules.append(module)
        layers[path] = (module.lora_down.weight, module.lora_up.weight, module.dora_scale)
    model.add_module("lycoris", modules)
    return Contestant(name, model, "dora", layers, norm_gradient="exact")


Builder = Callable[[nn.Module, Setting], Contestant]
BUILDERS: dict[str, Builder] = {
    FROZEN: frozen,
    LORA: partial(doratune, name=LORA, method="lora"),
    DORA: partial(doratune, name=DORA, method="dora"),
    "doratune DoRA, dropout": partial(doratune, name="doratune DoRA, dropout", method="dora", dropout=DROPOUT),
    EIGHT_BIT: eight_bit,
}
PRECISIONS = ((False, "bf16"), (True, "float32"))
"""Of PEFT's adapters on a 16-bit base."""
for _float32, _note in PRECISIONS:
    _name = f"PEFT LoRA {_note}"
    BUILDERS[_name] = partial(peft, name=_name, method="lora", float32=_float32)
for _float32, _note in PRECISIONS:
    for _dropout, _with in ((0.0, ""), (DROPOUT, ", dropout")):
        _name = f"PEFT DoRA {_note}{_with}"
        BUILDERS[_name] = partial(peft, name=_name, method="dora", float32=_float32, dropout=_dropout)
        _name += ACCELERATED
        BUILDERS[_name] = partial(accelerated, name=_name, float32=_float32, dropout=_dropout)
BUILDERS["LyCORIS DoRA"] = partial(lycoris, name="LyCORIS DoRA")
BUILDERS[FULL] = full


def merged(base: nn.Module, setting: Setting, values: dict[str, MovedAdapter]) -> list[Contestant]:
    """DoRA adapters with the values of round 0, put into the weights of a base of their own."""
    ours, theirs = (BUILDERS[name](copy.deepcopy(base), setting) for name in (DORA, "PEFT DoRA float32"))
    for contestant in (ours, theirs):
        contestant.take(values, 0)
    return [
        Contestant(f"{DORA}, merged", dt.merge(ours.model), "dora"),
        Contestant("PEFT DoRA, merged", theirs.model.merge_and_unload(), "dora"),
    ]
