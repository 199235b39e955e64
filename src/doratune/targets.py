"""What can be a target: the modules of a model, by the paths they had before adapters and wrappers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from doratune.config import matches
from doratune.errors import AdapterError
from doratune.layers import KINDS, AdaptedLayer, AdapterHolder, Part, SavedModule, StandIn, kind_of, parts_of

HEAD_NAMES = ("classifier", "score", "lm_head", "head", "classification_head", "qa_outputs")
"""Names of output heads, for models that cannot be asked."""
WRAPPER_NAMES = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""What torch.compile, activation checkpointing and FSDP add to paths of modules."""
STAND_IN_NAMES = ("base_layer", "_projections")
"""What our stand-ins add to them; modules of the user's may have parts with these names, too."""


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the model under the paths they had before adapters and wrappers, holders as well as their bases.

    What belongs to adapters alone, such as their copies of saved modules, is left out.
    """
    standing_in: set[str] = set()
    own_parts: tuple[str, ...] = ()
    for raw, module in unwrap(model).named_modules():
        if own_parts and raw.startswith(own_parts):
            continue
        dot = raw + "." if raw else ""
        if isinstance(module, StandIn):
            standing_in.add(raw)
        if isinstance(module, AdaptedLayer):
            own_parts += tuple(f"{dot}{name}" for name in module._modules if name != "base_layer")
        elif isinstance(module, SavedModule):
            own_parts += (f"{dot}copies",)
        parts = raw.split(".")
        added = [i for i, n in enumerate(parts) if n in STAND_IN_NAMES and ".".join(parts[:i]) in standing_in]
        if parts[-1] == "_projections" and len(parts) - 1 in added:
            continue
        kept = [part for i, part in enumerate(parts) if part not in WRAPPER_NAMES and i not in added]
        yield ".".join(kept), module


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of the model by path, as they were before adapters.

    Parts (the projections of an ``nn.MultiheadAttention``, fused experts), which are no modules, are listed, too.
    """
    modules = {path: module for path, module in walk(model) if not isinstance(module, StandIn | Part)}
    for path, module in list(modules.items()):
        modules.update({f"{path}.{name}".lstrip("."): part for name, part in parts_of(module).items()})
    return modules


def refuse_model(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Refuse models that no adapter can go to, whatever its options."""
    if kind_of(unwrap(model)) is not None or parts_of(unwrap(model)):
        raise AdapterError(
            f"targets: the model is itself a layer ({type(model).__name__}), and what holds an adapter has no place to "
            "stand in; wrap it, for example in nn.Sequential(model), and attach to that"
        )
    theirs = next((path for path, m in modules.items() if type(m).__module__.startswith("peft.tuners.")), None)
    if theirs is not None:
        raise AdapterError(
            f"targets: {theirs} is PEFT's ({type(modules[theirs]).__name__}), and its adapters would be adapted once "
            "more; take them out first (merge_and_unload() or unload()), or keep them and call dt.peft.accelerate"
        )
    lazy = [path for path, m in modules.items() if any(nn.parameter.is_lazy(p) for p in m.parameters(recurse=False))]
    if lazy:
        raise AdapterError(f"targets: the weights of {lazy[0]} have no shape yet; run a batch through the model first")
    compiled = next((path for path, m in modules.items() if isinstance(m, torch.jit.ScriptModule)), None)
    if compiled is not None:
        raise AdapterError(
            f"targets: {compiled or 'the model'} was compiled by torch.jit, which lets nobody keep its modes and "
            "parameters as they are; attach to the model as it was before that"
        )


def outermost(paths: Iterable[str]) -> list[str]:
    """The paths that lie inside no other: a module that is trained whole takes along what is inside."""
    kept: list[str] = []
    for path in sorted(paths, key=len):
        if not path.startswith(tuple(outer + "." for outer in kept)):
            kept.append(path)
    return kept


def refusal(modules: dict[str, nn.Module], path: str) -> str | None:
    """Why the module at ``path`` cannot be adapted, or None."""
    module = modules[path]
    kind = kind_of(module)
    if kind is None:
        below = [other for other in modules if other.startswith(f"{path}.") and kind_of(modules[other]) is not None]
        inside = sorted({other.rpartition(".")[2] for other in below})
        if inside:
            return f"{type(module).__name__} is no layer, but contains some: {', '.join(inside[:12])}"
        return f"no kind of layer serves {type(module).__name__}; served are {', '.join(k.name for k in KINDS)}"
    shape = getattr(getattr(module, "weight", None), "shape", ())
    if len(shape) > 1 and 0 in shape:  # what DeepSpeed leaves in a weight's place has one dimension
        return f"its weight is empty ({' x '.join(map(str, shape))})"
    return kind.refusal(module)


def shared_parameters(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Parameters that hang in the model more than once, by id: every place, module and name."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    return {key: found for key, found in places.items() if len(found) > 1}


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own model inside what runs it: DistributedDataParallel, DataParallel, DeepSpeed or torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel) or _is_deepspeed(model):
            model = model.module  # type: ignore[assignment]
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.Module):
            return model
        else:
            raise AdapterError(f"model: expected a torch.nn.Module, found a {type(model).__name__}")


def _is_deepspeed(model: nn.Module) -> bool:
    return any(c.__name__ == "DeepSpeedEngine" for c in type(model).__mro__)


def plain_path(path: str) -> str:
    """A module's path without the names that wrappers inside the model add to it."""
    return ".".join(part for part in path.split(".") if part not in WRAPPER_NAMES)


def holders(model: nn.Module) -> list[AdapterHolder]:
    """Every module of the model that holds adapters; two of them may share a place, one inside the other."""
    return [module for _, module in walk(model) if isinstance(module, AdapterHolder)]


def own_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that belong to adapters."""
    return {id(p) for h in holders(model) for name in h.adapter_names() for p in h.adapter_parameters(name)}


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The model's adapted layers by path."""
    return {path: module for path, module in walk(model) if isinstance(module, AdaptedLayer)}


def layers_of(model: nn.Module, name: str) -> dict[str, AdaptedLayer]:
    """The layers of one adapter by path."""
    return {path: layer for path, layer in adapted_layers(model).items() if name in layer.adapters}


def saved_modules(model: nn.Module) -> dict[str, SavedModule]:
    """The model's saved modules by path."""
    return {path: module for path, module in walk(model) if isinstance(module, SavedModule)}


def as_targets(paths: Sequence[str], modules: Iterable[str]) -> list[str] | str:
    """The shortest PEFT ``target_modules`` that match exactly ``paths`` among ``modules``."""
    wanted, everything = set(paths), list(modules)
    for names in (sorted({p.rpartition(".")[2] for p in wanted}), sorted(wanted)):
        if {m for m in everything if m and matches(m, names)} == wanted:
            return names
    return "|".join(re.escape(p) for p in sorted(wanted))
