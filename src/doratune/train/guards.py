"""What keeps transformers' and TRL's Trainers from spoiling adapters, and refuses what they would not train or keep."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from doratune.distributed import is_fully_sharded
from doratune.errors import AdapterError
from doratune.layers import AdaptedLayer
from doratune.model import active_adapter, trainable_parameters
from doratune.targets import adapted_layers, holders

log = logging.getLogger("doratune")


def trainable_when_quantised(model: Any) -> Any:
    """Trainer refuses quantised models unless they carry PEFT's adapters; doratune's will do as well.

    Kinds that let no gradient through stay refused; of torchao's the layers know better than transformers.
    """
    if not getattr(model, "is_quantized", False) or active_adapter(model) is None:
        return model
    quantizer = getattr(model, "hf_quantizer", None)
    torchao = type(quantizer).__name__.startswith("TorchAo")
    if quantizer is None or torchao or quantizer.is_trainable:
        model._hf_peft_config_loaded = True
    return model


@contextlib.contextmanager
def resumable(model: Any, given: Sequence[Any]) -> Iterator[None]:
    """Trainer refuses checkpoints of models that were sharded while loading, as it cannot save their optimiser's state.

    The state of an adapter's optimiser is saved here. Trainers differ in where their arguments stand.
    """
    args = next((one for one in given if hasattr(one, "save_only_model")), None)
    if args is None or not isinstance(model, nn.Module) or active_adapter(model) is None:
        yield
        return
    before, args.save_only_model = args.save_only_model, args.save_only_model or is_fully_sharded(model)
    try:
        yield
    finally:
        args.save_only_model = before


@contextlib.contextmanager
def keeping_masters(model: Any) -> Iterator[None]:
    """Undo what SFTTrainer does to quantised models: casting trained parameters, magnitudes too, to bfloat16."""
    parameters = trainable_parameters(model).values() if isinstance(model, nn.Module) else ()
    masters = [(parameter, parameter.data) for parameter in parameters]
    yield
    for parameter, data in masters:
        if parameter.dtype != data.dtype:
            parameter.data = data.to(parameter.device)


def disable_dropout_with_trl(trainer: Any) -> None:
    """Do to adapters, whose dropout is an option, what TRL's ``disable_dropout`` does to ``nn.Dropout``."""
    if not getattr(trainer.args, "disable_dropout", False):
        return
    disabled = set()
    for layer in adapted_layers(trainer.model).values():
        for adapter in layer.adapters.values():
            if adapter.config.dropout:
                disabled.add(adapter.config.dropout)
                adapter.config = dataclasses.replace(adapter.config, dropout=0.0)
    if disabled:
        found = " and ".join(map(str, sorted(disabled)))
        log.warning("disable_dropout: the adapter's dropout of %s is off; disable_dropout=False keeps it", found)


def refuse_bypassed_head(model: nn.Module) -> None:
    """TRL's trainers give a model a forward that multiplies with the head's weight and never calls the head."""
    if active_adapter(model) is None:
        return
    # A wrapper may have taken over every name of what it wraps, but not the module it was written in.
    function = inspect.unwrap(model.forward, stop=_is_trls)
    head = model.get_output_embeddings() if _is_trls(function) else None  # type: ignore[operator]
    if isinstance(head, AdaptedLayer) and head.active is not None:
        raise AdapterError(
            f"the output head {head.path} has an adapter, and TRL's trainers compute their loss from its weight, past "
            f"the adapter, which would not learn; leave {head.path} out of the targets, or train it whole with "
            f"modules_to_save=[{head.path.rpartition('.')[2]!r}]"
        )


def _is_trls(function: Any) -> bool:
    return str(getattr(function, "__globals__", {}).get("__name__")).startswith("trl.")


def refuse_strangers(model: nn.Module) -> None:
    """Parameters that train outside the adapter would be missing from its checkpoints."""
    name = active_adapter(model)
    own = {id(p) for h in holders(model) if name in h.adapter_names() for p in h.adapter_parameters(name)}
    strangers = [n for n, p in trainable_parameters(model).items() if id(p) not in own]
    if strangers:
        raise AdapterError(
            f"{len(strangers)} trained parameters are no part of the adapter {name!r}, so its checkpoints would not "
            f"hold them: {', '.join(strangers[:5])}; name their modules in modules_to_save, or freeze them"
        )
