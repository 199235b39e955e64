"""Runs on several processes, as torchrun and accelerate start them: what is served, and what is refused by name."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from doratune.distributed import is_fully_sharded
from doratune.errors import AdapterError
from doratune.model import active_adapter
from doratune.train.processes import processes_asked


def refuse_unserved(trainer: Any) -> None:
    """Look at what a Trainer has been set up for.

    Raises:
        AdapterError: for ways of spreading a model that adapters do not work with, or that this machine would not run.
    """
    state, args = trainer.accelerator.state, trainer.args
    if processes_asked() > 1 and args.world_size == 1 and torch.distributed.is_available():
        raise AdapterError(
            f"{processes_asked()} processes were started, and each would train alone: on a CPU accelerate joins "
            "them with TrainingArguments(use_cpu=True) only"
        )
    deepspeed = getattr(state, "deepspeed_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise AdapterError(
            "DeepSpeed ZeRO-3 takes the weights away that a magnitude's norm needs; use FSDP2, or ZeRO-2"
        )
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:
        raise AdapterError(
            "FSDP1 flattens the weights that a magnitude's norm needs; use FSDP2: fsdp_config={'version': 2}, or "
            "accelerate launch --fsdp_version 2"
        )
    asked = args.fsdp_plugin_args is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and plugin is None:
        raise AdapterError(
            f"FSDP was asked for, but accelerate runs it on accelerators only, not on a {args.device.type} "
            "(it would copy the whole model to every process instead); load the model with "
            "from_pretrained(..., distributed_config=DistributedConfig(fsdp_size=...)), as doratune train --fsdp does"
        )
    if plugin is not None and any(type(p).__name__ == "Params4bit" for p in trainer.model.parameters()):
        raise AdapterError(
            "bitsandbytes' 4-bit weights do not survive FSDP2: accelerate leaves them whole on every process; "
            "use DDP (plain torchrun), which needs no more memory then, or torchao-int8"
        )


def keep_torchao_from_ddp(model: nn.Module) -> None:
    """Tell DistributedDataParallel to leave torchao's weights as every process loaded them.

    It would send the first process's to all when it wraps the model, as bytes, which these tensors cannot be seen as.
    """
    names = [name for name, p in model.named_parameters() if type(p).__module__.startswith("torchao.")]
    if names:
        known = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, {*known, *names})


def refuse_unsynchronised(trainer: Any) -> None:
    """Look at a Trainer's model when it is ready to train.

    Raises:
        AdapterError: if there are several processes, and nothing that would keep their adapters the same.
    """
    if trainer.args.world_size == 1 or active_adapter(trainer.model) is None:
        return
    wrapped = trainer.model_wrapped
    inner = getattr(wrapped, "_orig_mod", wrapped)
    kept = isinstance(inner, nn.parallel.DistributedDataParallel) or is_fully_sharded(inner)
    if not (kept or trainer.is_deepspeed_enabled or trainer.is_distributed_loading_by_transformers):
        raise AdapterError(
            f"{trainer.args.world_size} processes would each train an adapter of its own: the model "
            f"({type(inner).__name__}) is wrapped neither by DistributedDataParallel nor by FSDP2"
        )
