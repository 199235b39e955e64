"""The fused experts of a mixture, forward and backward: DoRA and LoRA on all of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import doratune as dt
from bench.contestants import DORA, FROZEN, LORA, PRECISIONS, Builder, Contestant, Setting, frozen, share
from bench.options import Benchmark, Report, Watch
from bench.results import Point
from bench.tasks import LayerTask
from bench.trial import Trial
from doratune.ops.reference import dora_weight, lora_weight
from doratune.ops.stacked import each
from doratune.study.footprint import saved_bytes
from doratune.study.moved import MovedAdapter, moved_adapter
from doratune.targets import adapted_layers

NAMES = ("gate_up_proj", "down_proj")
CHOSEN = 2
"""Experts of each token."""


class Mixture(nn.Module):
    """Qwen3-MoE's experts, with random weights and a fixed choice of experts."""

    def __init__(self, shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> None:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        super().__init__()
        torch.manual_seed(0)
        self.experts = Qwen3MoeExperts(
            SimpleNamespace(
                num_experts=shape["experts"],
                hidden_size=shape["width"],
                moe_intermediate_size=shape["inner"],
                hidden_act="silu",
                _experts_implementation="grouped_mm",
            )
        )
        for p in self.experts.parameters():
            nn.init.normal_(p, std=0.02)
        self.to(device, dtype).requires_grad_(False)
        scores = torch.rand(shape["tokens"], shape["experts"]).topk(CHOSEN)
        self.register_buffer("index", scores.indices.to(device))
        self.register_buffer("routing", scores.values.to(device, dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.index, self.routing)


class Reference(nn.Module):
    """The same, expert by expert, with every adapted weight written out in float32."""

    def __init__(self, base: Any, values: dict[str, MovedAdapter], scale: float, method: str) -> None:
        super().__init__()
        self.base, self.scale, self.method = (base,), scale, method
        self.adapters = {name: tuple(nn.Parameter(t.clone()) for t in (v.A, v.B, v.m)) for name, v in values.items()}

    def _weights(self, name: str) -> list[Tensor]:
        A, B, m = self.adapters[name]
        W = getattr(self.base[0].experts, name).float()
        parts = zip(W, *each(A, B), m.view(len(W), -1), strict=True)
        if self.method == "lora":
            return [lora_weight(w, a, b, self.scale) for w, a, b, _ in parts]
        return [dora_weight(w, a, b, length, self.scale) for w, a, b, length in parts]

    def forward(self, x: Tensor) -> Tensor:
        base, y = self.base[0], torch.zeros_like(x, dtype=torch.float32)
        for expert, (first, second) in enumerate(zip(*map(self._weights, NAMES), strict=True)):
            token, place = (base.index == expert).nonzero(as_tuple=True)
            gate, up = F.linear(x[token].float(), first).chunk(2, dim=-1)
            part = F.linear(F.silu(gate) * up, second) * base.routing[token, place, None].float()
            y = y.index_add(0, token, part)
        return y


@dataclass
class PeftContestant(Contestant):
    """PEFT's B has the ranks of all experts side by side."""

    experts: int = 0

    @torch.no_grad()
    def take(self, values: dict[str, MovedAdapter], round_number: int) -> None:
        for path, (A, B, _) in self.adapters.items():
            now = values[path].at(round_number)
            A.copy_(now.A)
            B.copy_(each(now.A, now.B)[1].permute(1, 2, 0).flatten(1))
        self.model.zero_grad(set_to_none=True)

    def gradients(self) -> dict[str, list[Tensor]]:
        found = {"A": [], "B": []}
        for A, B, _ in self.adapters.values():
            found["A"].append(A.grad.flatten())
            found["B"].append(B.grad.unflatten(1, (-1, self.experts)).permute(2, 0, 1).flatten())
        return found


def doratune(base: nn.Module, setting: Setting, *, name: str, method: str) -> Contestant:
    config = dt.AdapterConfig(method=method, rank=setting.rank, alpha=setting.alpha, targets=setting.paths)
    model = dt.attach(share(base), config)
    adapters = {}
    for path, layer in adapted_layers(model).items():
        m = layer.magnitude["default"] if method == "dora" else None
        adapters[path.rpartition(".")[2]] = (layer.lora_A["default"], layer.lora_B["default"], m)
    return Contestant(name, model, method, adapters)


def peft(base: Any, setting: Setting, *, name: str, float32: bool) -> Contestant:
    from peft import LoraConfig, get_peft_model

    parameters = [f"experts.{part}" for part in setting.paths]
    config = LoraConfig(r=setting.rank, lora_alpha=setting.alpha, target_modules=[], target_parameters=parameters)
    model = get_peft_model(share(base), config, autocast_adapter_dtype=float32)
    outer = model.base_model.model.experts
    wrappers = dict(zip(NAMES, (outer.base_layer, outer), strict=True))
    adapters = {n: (w.lora_A["default"].weight, w.lora_B["default"].weight, None) for n, w in wrappers.items()}
    return PeftContestant(name, model, "lora", adapters, experts=len(base.experts.down_proj))


BUILDERS: dict[str, Builder] = {
    FROZEN: frozen,
    LORA: partial(doratune, name=LORA, method="lora"),
    DORA: partial(doratune, name=DORA, method="dora"),
}
for _float32, _note in PRECISIONS:
    BUILDERS[f"PEFT LoRA {_note}"] = partial(peft, name=f"PEFT LoRA {_note}", float32=_float32)


class ExpertsTrial(Trial):
    """Contestants on a mixture's experts."""

    builders = BUILDERS

    def moved(self) -> dict[str, MovedAdapter]:
        values = {}
        for seed, name in enumerate(self.setting.paths):
            W = getattr(self.base.experts, name)
            count, out, columns = W.shape
            tiles = [(slice(i * out, (i + 1) * out), w) for i, w in enumerate(W)]
            shape = count * out, columns
            values[name] = moved_adapter(tiles, shape, self.setting.rank, self.setting.scale, seed, count)
        return values

    def reference(self, like: Contestant) -> Contestant:
        values = {name: value.at(0) for name, value in self.values.items()}
        model = Reference(self.base, values, self.setting.scale, like.method)
        adapters = {n: (A, B, m if like.method == "dora" else None) for n, (A, B, m) in model.adapters.items()}
        return Contestant("reference", model, like.method, adapters)


@dataclass
class Experts(Benchmark):
    """A mixture's fused experts, forward and backward, and what is kept for the backward pass."""

    what: ClassVar[str] = "experts"
    title: ClassVar[str] = "Forward and backward of a mixture's experts"
    note: ClassVar[str] = (
        f"Qwen3-MoE's experts with {CHOSEN} for each token, adapters on both projections of all; time relative to the "
        "frozen experts (forward and input gradient), median of paired ratios with its 95 % interval; saved: what is "
        "kept for the backward pass, without parameters and inputs. Adapters have moved and change between rounds; "
        "outputs and all gradients are compared with a plain reference. PEFT has no DoRA for experts."
    )

    def points(self) -> list[Point]:
        shape = {"experts": 16, "width": 1024, "inner": 512, "tokens": 512, "rank": 16}
        if self.torch_device().type == "cuda":  # Qwen3-30B-A3B's
            shape |= {"experts": 128, "width": 2048, "inner": 768, "tokens": 8192}
        if self.quick:
            shape = {"experts": 4, "width": 64, "inner": 32, "tokens": 32, "rank": 4}
        title = "{experts} experts, {width:,} to {inner:,} and back, {tokens:,} tokens, r {rank}"
        return [Point(title.format(**shape), shape)]

    def measure(self, point: Point, watch: Watch) -> Report:
        shape, dtype, device = point.shape, self.torch_dtype(), self.torch_device()
        base = Mixture(shape, dtype, device)
        names = [name for name in BUILDERS if dtype != torch.float32 or "bf16" not in name]
        task = LayerTask(shape["width"], shape["width"], shape["tokens"], dtype, device)
        trial = ExpertsTrial(base, Setting(NAMES, shape["rank"]), names, task)
        trial.race(trial.step, **self.race_options(watch))
        for name, contestant in trial.contestants.items():
            known = [*contestant.model.parameters(), *contestant.model.buffers(), task.inputs]
            saved = saved_bytes(lambda model=contestant.model: task.forward(model), known)
            trial.entries[name].measured = {"saved MB": saved / 1e6}
        return trial.report(), {}
