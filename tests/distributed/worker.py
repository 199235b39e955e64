"""Run by torchrun in two processes: each part writes what it found to a JSON file; nothing is judged here."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers.distributed import DistributedConfig

import doratune as dt
from distributed.common import (
    ACCUMULATED,
    CONFIG,
    IDS,
    STEPS,
    attached,
    in_torchaos,
    load,
    on_stream,
    read,
    steps,
    trainer,
)
from doratune.distributed import load_base
from doratune.layers.sharded import assign, whole
from doratune.targets import adapted_layers
from helpers import error, move

FOLDER = Path(sys.argv[1])
MODEL = FOLDER / "model"


def kinds(model: nn.Module) -> list[bool]:
    """Whether W, and m, of a layer lie in parts."""
    layer = next(iter(adapted_layers(model).values()))
    return [isinstance(layer.base_layer.weight, DTensor), isinstance(layer.magnitude["default"], DTensor)]


@contextlib.contextmanager
def accelerate_with_fsdp_on_cpu() -> Any:
    """accelerate's state lacks the case, everything below it serves a CPU."""
    from accelerate.state import AcceleratorState, DistributedType

    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init
    try:
        yield
    finally:
        AcceleratorState.__init__ = original


def trained(name: str, model: nn.Module, **options: Any) -> dict[str, Any]:
    at_a_time = 4 // distributed.get_world_size() // options.get("gradient_accumulation_steps", 1)
    run = trainer(model, FOLDER / name, at_a_time, **options)
    if not run.is_fsdp_enabled:  # where Trainer itself refuses
        run.evaluate()  # which has made accelerate take the model for wrapped
    run.train()
    same = [whole(p.detach()).clone() for p in dt.trainable_parameters(run.model).values()]
    others = [torch.empty_like(t) for t in same]
    for mine, other in zip(same, others, strict=True):
        other.copy_(mine)
        distributed.broadcast(other, 0)
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    equal = all(torch.equal(mine, other) for mine, other in zip(same, others, strict=True))
    return {
        "losses": losses,
        "parts": kinds(run.model),
        "wrapped": type(run.model_wrapped).__name__,
        "equal": equal,
        "dtypes": sorted({str(p.dtype) for p in dt.trainable_parameters(run.model).values()}),
    }


def ddp() -> dict[str, Any]:
    return trained("ddp", attached(load(MODEL)))


def torchao() -> dict[str, Any]:
    return {kind: trained(kind, attached(in_torchaos(kind))) for kind in ("torchao-int8", "torchao-int4")}


def accumulated() -> dict[str, Any]:
    ways = {"ddp": None, "fsdp": DistributedConfig(fsdp_size=2)}
    return {way: trained(f"accumulated-{way}", attached(load(MODEL, how)), **ACCUMULATED) for way, how in ways.items()}


def half_precision() -> dict[str, Any]:
    ways = {"ddp": None, "fsdp": DistributedConfig(fsdp_size=2)}
    return {way: trained(f"half-{way}", attached(load(MODEL, how, torch.bfloat16))) for way, how in ways.items()}


def stream() -> dict[str, Any]:
    run = on_stream(FOLDER, "stream", 2)
    rows: list[Any] = [None, None]
    distributed.all_gather_object(rows, read(run))
    run.train()
    return {"rows": rows, "losses": [entry["loss"] for entry in run.state.log_history if "loss" in entry]}


def fsdp() -> dict[str, Any]:
    return trained("fsdp", attached(load(MODEL, DistributedConfig(fsdp_size=2))))


def resumed() -> dict[str, Any]:
    """What one process began is ended by two, of which each has parts."""
    run = trainer(attached(load(MODEL, DistributedConfig(fsdp_size=2))), FOLDER / "one", 2)
    run.train(resume_from_checkpoint=str(FOLDER / "one" / f"checkpoint-{STEPS // 2}"))
    return {"losses": [entry["loss"] for entry in run.state.log_history if "loss" in entry]}


def accelerated() -> dict[str, Any]:
    """FSDP2 as accelerate does it: adapters lie in parts, too."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    options = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    with accelerate_with_fsdp_on_cpu():
        return trained("accelerated", attached(load(MODEL)), **options)


def refused() -> dict[str, str]:
    """Messages by what was tried."""
    from accelerate.state import AcceleratorState

    found = {}

    def attempt(name: str, make: Any) -> None:
        AcceleratorState._reset_state()
        try:
            make()
        except dt.AdapterError as raised:
            found[name] = str(raised)

    parallel = nn.parallel.DistributedDataParallel(load(MODEL))
    attempt("attach to DDP", lambda: dt.attach(parallel, CONFIG))
    sharded = fully_shard(load(MODEL))
    attempt("attach to FSDP2", lambda: dt.attach(sharded, CONFIG))
    attempt("FSDP2 on a CPU", lambda: trainer(attached(load(MODEL)), FOLDER / "no", 2, fsdp=True))
    model = attached(load(MODEL))
    fully_shard(model)
    attempt("merge under FSDP2", lambda: dt.merge(model))
    attempt("convert under FSDP2", lambda: dt.convert_to_lora(model))
    return found


ONE = {"num_hidden_layers": 1}
"""Enough of the model for everything that one step shows."""


def parallel_by_torch() -> nn.Module:
    model, mesh = load(MODEL, **ONE), distributed.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
        plan = {name: ColwiseParallel() for name in columns}
        rows = {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
        parallelize_module(layer, mesh, {**plan, **rows})
    return model


def tensor_parallel() -> dict[str, Any]:
    """Everything that tensor parallelism is promised for, against one process; numbers are relative errors."""
    result: dict[str, Any] = {}
    cases = {"hf": CONFIG, "torch": CONFIG, "exact": dt.AdapterConfig(rank=4, norm_gradient="exact"),
             "lora": dt.AdapterConfig(rank=4, method="lora"), "magnitude": dt.AdapterConfig(rank=0)}  # fmt: skip
    for name, config in cases.items():
        one = attached(load(MODEL, **ONE), config)
        spread = parallel_by_torch() if name == "torch" else load(MODEL, DistributedConfig(tp_size=2), **ONE)
        other = attached(spread, config)
        pairs = list(zip(dt.trainable_parameters(one).values(), dt.trainable_parameters(other).values(), strict=True))
        found = {"start": max(error(whole(q), p) for p, q in pairs if p.any())}
        move(one)
        if name == "hf":  # B A nearly takes W's place in one row of each layer
            for layer in adapted_layers(one).values():
                near_cancellation(layer)
        for p, q in pairs:
            assign(q.detach(), p.detach())
        for model in (one, other):
            for layer in adapted_layers(model).values():
                layer.decide("default")
        found["dense"] = float(sum(layer.adapters["default"].dense_norm for layer in adapted_layers(other).values()))
        losses = [model(IDS, labels=IDS).loss for model in (one, other)]
        for loss in losses:
            loss.backward()
        found["loss"] = abs(float(losses[0].detach()) - float(losses[1].detach()))
        found["gradients"] = max(error(whole(q.grad), p.grad) for p, q in pairs)
        expected = one.eval()(IDS).logits
        with torch.no_grad():
            found["evaluation"] = error(other.eval()(IDS).logits, expected)
            with dt.frozen_scales(other):
                found["frozen"] = error(other(IDS).logits, expected)
        dt.save_adapter(other, FOLDER / f"tp-{name}")
        dt.save_adapter(one, FOLDER / f"tp-{name}-expected-{distributed.get_rank()}")
        dt.merge(other, verify=name != "hf")  # cancellation costs outputs digits, whoever computes them
        with torch.no_grad():
            found["merged"] = error(other(IDS).logits, expected)
        result[name] = found
    model = attached(load(MODEL, DistributedConfig(tp_size=2)))
    result["losses"] = steps(model)
    result["parts"] = kinds(model)
    return result


@torch.no_grad()
def near_cancellation(layer: Any) -> None:
    W = layer.base_layer.weight
    layer.lora_A["default"][0] = W[0] / layer.adapters["default"].scale
    layer.lora_B["default"][0] = 0
    layer.lora_B["default"][0, 0] = -0.999


def meta_start() -> dict[str, Any]:
    """A model that no process ever holds whole."""
    config = transformers.AutoConfig.from_pretrained(MODEL)
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    attached(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    load_base(model, MODEL)
    layer = next(iter(adapted_layers(model).values()))
    plain = attached(load(MODEL))
    first = next(iter(adapted_layers(plain).values()))
    with torch.no_grad():
        output = error(model.eval()(IDS).logits, plain.eval()(IDS).logits)
    return {
        "parts": kinds(model),
        "magnitudes": error(whole(layer.magnitude["default"]), first.magnitude["default"]),
        "output": output,
    }


def experts() -> dict[str, Any]:
    """Fused experts in parts, with adapters in parts, on the same tokens in both processes."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = transformers.Qwen3MoeConfig(vocab_size=256, num_experts=5, num_experts_per_tok=2, **sizes, **heads)
    transformers.set_seed(1)
    plain = transformers.Qwen3MoeForCausalLM(config)
    spread = copy.deepcopy(plain)
    for model in (plain, spread):
        attached(model, dt.AdapterConfig(rank=4, targets=["q_proj", "gate_up_proj", "down_proj"]))
    fully_shard(spread.model.layers[0])
    fully_shard(spread)
    return {"parts": kinds(spread), "losses": steps(spread, 5), "expected": steps(plain, 5)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    parts = (ddp, torchao, stream, fsdp, accumulated, half_precision, resumed, tensor_parallel, meta_start, experts)
    for part in (*parts, accelerated, refused):
        gc.collect(), gc.freeze()  # what imports have made is not collected at the end of each run
        result = part()
        if distributed.get_rank() == 0:
            (FOLDER / f"{part.__name__}.json").write_text(json.dumps(result))
        distributed.barrier()
    distributed.destroy_process_group()
