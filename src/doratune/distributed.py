"""Models on several processes: what works with which way of spreading them, and weights that are loaded in parts.

The ways are torch's: DistributedDataParallel (a copy on every process), ``fully_shard`` (FSDP2: parts everywhere, whole
layers only while they compute) and tensor parallelism (parts everywhere, which compute as parts).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn

from doratune.config import AdapterConfig
from doratune.errors import AdapterError
from doratune.layers import Kind
from doratune.layers.holder import plain_parameters
from doratune.layers.sharded import assign, refusal, whole
from doratune.layers.weights import is_dtensor
from doratune.targets import adapted_layers, plain_modules, saved_modules, shared_parameters, unwrap


def processes() -> int:
    """How many processes work together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes what all have in common."""
    return processes() == 1 or distributed.get_rank() == 0


def leave_group() -> None:
    """End what joins the processes, as the last thing that a program does."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def is_spread(model: nn.Module) -> bool:
    """Whether parts of the model's parameters lie on several processes, which then have to save and load together."""
    return any(is_dtensor(p) for p in model.parameters())


def writes(model: nn.Module) -> bool:
    """Whether this process writes a model's files: the first one where parts lie on several, else whoever is asked."""
    return is_first() or not is_spread(model)


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 (``fully_shard``) gathers the model's parameters for each forward."""
    if processes() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def refuse_unattachable(model: nn.Module, layers: Mapping[str, Kind], config: AdapterConfig, trainable: bool) -> None:
    """Refuse a model whose way of being spread keeps an adapter from these layers.

    Raises:
        AdapterError: listing what keeps an adapter from being attached, or from being trained the same everywhere.
    """
    root = unwrap(model)
    problems = list(_unserved(root))
    sharded = is_fully_sharded(root)
    late = "it would not {} a new adapter's parameters, and the processes would train different ones; {}"
    if trainable and processes() > 1 and isinstance(model, nn.parallel.DistributedDataParallel):
        problems.append("DistributedDataParallel: " + late.format("average the gradients of", "attach before wrapping"))
    # Trainer averages the gradients of what is added to a model that transformers itself has sharded while loading.
    if trainable and sharded and (config.modules_to_save or config.bias != "none"):
        problems.append("fully_shard: modules_to_save and biases are copied, which FSDP2 lets happen before it only")
    if trainable and sharded and not getattr(root, "is_distributed_loading_by_transformers", False):
        problems.append("fully_shard: " + late.format("know", "attach before fully_shard"))
    if not sharded:
        modules = plain_modules(root)
        problems += [f"{path}: {why}" for path in layers if (why := refusal(modules[path], config))]
    if problems:
        raise AdapterError.of("this model cannot take an adapter", problems)


def _unserved(root: nn.Module) -> list[str]:
    """What others do to a model that leaves no weights to look at."""
    found = []
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in root.modules()):
        found.append("FSDP1 (FullyShardedDataParallel) has flattened its weights; use FSDP2 (fully_shard)")
    if any(hasattr(parameter, "ds_id") for parameter in root.parameters()):
        found.append("DeepSpeed ZeRO-3 has taken its weights away; use FSDP2 (fully_shard), or ZeRO-2")
    return found


def initialise(model: nn.Module) -> None:
    """Give start values to adapters that were attached before the base had weights (meta device).

    Under FSDP2 call it on every process, after the weights are there and before the first forward; ``load_base`` and
    ``load_state_dict`` do it by themselves.
    """
    for layer in adapted_layers(unwrap(model)).values():
        layer.initialise()
    for saved in saved_modules(unwrap(model)).values():
        saved.initialise()


def load_base(model: nn.Module, folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> None:
    """Fill the base from a folder of safetensors files, then initialise adapters that wait for it.

    Every process reads only the parts that it holds, file by file, so a model may be larger than any one's memory::

        with accelerate.init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
        doratune.attach(model, AdapterConfig())
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        doratune.distributed.load_base(model, folder, "cuda")

    Args:
        model: with its adapters; parameters may be DTensors, of FSDP2 or tensor parallelism, or plain tensors.
        folder: with the names of the model's own state dict; a weight that is tied to another may be absent.
        device: where what is on the meta device gets its memory. Buffers that are there stay; others are not in files.

    Raises:
        AdapterError: listing parameters that the files lack.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    root = unwrap(model)
    shared = shared_parameters(root)
    root._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    for (owner, own), *others in shared.values():  # off the meta device every module got one of its own
        if not is_dtensor(owner._parameters[own]):  # or they are FSDP's
            for module, name in others:
                module._parameters[name] = owner._parameters[own]
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    absent: dict[str, int] = {}
    for name, parameter in plain_parameters(root):
        if name in stored:
            state[name] = parameter.detach()
            seen.add(id(parameter))
        else:
            absent[name] = id(parameter)
    problems = [f"{name}: not in the files of {folder}" for name, key in absent.items() if key not in seen]
    if problems:
        raise AdapterError.of("the base cannot be loaded", problems)
    load(state, storage_reader=reader, no_dist=processes() == 1)
    initialise(root)
    for layer in adapted_layers(root).values():
        layer.cache.clear()


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """An optimiser's state dict without parts, as one process alone would have it; every process has to call it."""
    state = optimizer.state_dict()
    state["state"] = {
        index: {key: whole(value).cpu() if isinstance(value, Tensor) else value for key, value in values.items()}
        for index, values in state["state"].items()
    }
    return state


def load_whole_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict without parts; each process takes those that belong to its parameters' parts."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state["state"].items():
        like = parameters[index]
        for key, value in values.items():
            if is_dtensor(like) and value.shape == like.shape:
                values[key] = torch.zeros_like(like, dtype=value.dtype)
                assign(values[key], value)
    optimizer.load_state_dict(state)
