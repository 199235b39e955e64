"""Which modules of a model an adapter goes to, decided and checked before anything is changed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from doratune.config import ALL_LINEAR, AdapterConfig, matches, vain_options
from doratune.errors import AdapterError
from doratune.layers import KINDS, AdaptedLayer, AdapterHolder, Kind, SavedModule, StandIn, kind_of
from doratune.layers.attention import Projection, projections
from doratune.layers.bypass import held_aside, reader
from doratune.layers.holder import plain, plain_parameters

HEAD_NAMES = ("classifier", "score", "lm_head", "head", "classification_head", "qa_outputs")
"""Names of output heads, for models that cannot be asked."""
WRAPPER_NAMES = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""What torch.compile, activation checkpointing and FSDP add to paths of modules."""
STAND_IN_NAMES = ("base_layer", "_projections")
"""What our stand-ins add to them; modules of the user's may have parts with these names, too."""
LISTED = 5
"""Modules of one trouble that an error names."""


@dataclass
class Selection:
    """What an adapter's options mean on one model."""

    layers: dict[str, Kind] = field(default_factory=dict)
    """Paths of modules to adapt, with the kind of each."""
    saved: dict[str, list[str]] = field(default_factory=dict)
    """Paths of modules of which the adapter gets a copy, with the parameters that it trains there."""
    left_alone: dict[str, str] = field(default_factory=dict)
    """Paths of modules that could have been adapted and are not, each with the reason."""


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

    The projections of an ``nn.MultiheadAttention``, which are no modules, are listed as if they were.
    """
    modules = {path: module for path, module in walk(model) if not isinstance(module, StandIn | Projection)}
    for path, module in list(modules.items()):
        if isinstance(module, nn.MultiheadAttention):
            modules.update({f"{path}.{name}".lstrip("."): p for name, p in projections(module).items()})
    return modules


def select(model: nn.Module, config: AdapterConfig) -> Selection:
    """Find the modules an adapter goes to.

    Raises:
        AdapterError: listing targets that match nothing, or only modules that cannot be adapted.
    """
    modules = plain_modules(model)
    refuse_model(model, modules)
    problems: list[str] = []
    aside = held_aside(modules)
    selection = Selection(saved=_saved_whole(config, modules, aside, problems))
    heads = _heads(modules)
    everything = config.targets == ALL_LINEAR
    unserved: dict[str, str] = {}
    passed_over: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for path, module in modules.items():
        chosen = _is_linear(module) if everything else bool(path) and matches(path, config.targets)
        if not chosen:
            if everything and hasattr(module, "qweight"):  # else only the few linear layers beside would be adapted
                unserved[path] = refusal(modules, path) or ""
            continue
        if any(f"{path}.".startswith(f"{saved}.") for saved in selection.saved):
            left_out[path] = "modules_to_save, which trains them whole"
            continue
        if _excluded(path, config.exclude):
            left_out[path] = f"exclude {config.exclude!r}"
            continue
        other_use = "output head" if path in heads else reader(modules, path)
        if everything and other_use is not None:
            selection.left_alone[path] = other_use
            continue
        kind = kind_of(module)
        reason = refusal(modules, path) or aside.get(id(module)) or (kind.config_refusal(config) if kind else None)
        if kind is not None and reason is None:
            selection.layers[path] = kind
        elif everything:
            selection.left_alone[path] = reason or ""
        elif kind is None and isinstance(config.targets, str):
            passed_over[path] = reason or ""  # an expression may well match containers, too
        else:
            unserved[path] = reason or ""
    if not everything and not isinstance(config.targets, str):
        for target in config.targets:
            if not any(matches(path, [target]) for path in modules):
                problems.append(f"target {target!r} matches no module{_suggestion(target, modules)}")
    problems.extend(_vain_exclusions(config.exclude, modules))
    if selection.layers and not problems and not unserved:
        for option, entry in vain_options(config, selection.layers):
            problems.append(f"{option} {entry!r} matches no module that is adapted{_suggestion(entry, modules)}")
    if not selection.layers and not problems and not unserved:
        unserved = passed_over
        if not unserved:
            problems.append(_nothing(config, modules, selection, left_out))
    if problems or unserved:
        lines = [*problems, *(f"{path}: {reason}" for path, reason in unserved.items())]
        raise AdapterError.of("targets", lines, at_most=len(problems) + LISTED)
    if config.bias == "all":
        selection.saved.update(_other_biases(modules, selection))
    return selection


def refuse_model(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Refuse models that no adapter can go to, whatever its options."""
    if kind_of(unwrap(model)) is not None or isinstance(unwrap(model), nn.MultiheadAttention):
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


def _saved_whole(
    config: AdapterConfig, modules: dict[str, nn.Module], aside: dict[int, str], problems: list[str]
) -> dict[str, list[str]]:
    """The modules of ``modules_to_save`` with all their parameters; what cannot be goes to ``problems``."""
    paths: list[str] = []
    for name in config.modules_to_save:
        found = [path for path in modules if path and matches(path, [name])]
        if not found:
            problems.append(f"modules_to_save {name!r} matches no module{_suggestion(name, modules)}")
        problems.extend(f"modules_to_save {p}: {aside[id(modules[p])]}" for p in found if id(modules[p]) in aside)
        paths += found
    return {path: [n for n, _ in plain_parameters(modules[path])] for path in outermost(dict.fromkeys(paths))}


def _other_biases(modules: dict[str, nn.Module], selection: Selection) -> dict[str, list[str]]:
    """Modules with biases that belong to no adapted layer and no module saved whole, with these biases."""
    inside = tuple(path + "." for path in selection.saved)
    hosted = {path.rpartition(".")[0] for path, kind in selection.layers.items() if kind.name == "attention"}
    found = {}
    for path, module in modules.items():
        own = [n for n, _ in module.named_parameters(recurse=False) if "bias" in n]
        if isinstance(module, nn.MultiheadAttention) and module.out_proj.bias is not None:
            own.append("out_proj.bias")  # which the module computes with itself
        taken = path in selection.layers or path in selection.saved or path in hosted
        if own and path and not taken and not path.startswith(inside):
            found[path] = own
    return found


def _excluded(path: str, exclude: str | Sequence[str]) -> bool:
    """PEFT's rule for an expression, which may well match containers in passing; a name covers what lies under it."""
    if isinstance(exclude, str):
        return matches(path, exclude)
    return any(f".{name}." in f".{path}." for name in exclude)


def _vain_exclusions(exclude: str | Sequence[str], modules: dict[str, nn.Module]) -> Iterator[str]:
    """Entries that leave nothing out: what was to be spared would be adapted."""
    if not isinstance(exclude, str):
        for name in exclude:
            if not any(_excluded(path, [name]) for path in modules):
                yield f"exclude {name!r} matches no module{_suggestion(name, modules)}"
        return
    containers = {path.rpartition(".")[0] for path in modules if path}
    matched = [path for path in modules if path and matches(path, exclude)]
    if exclude and not matched:
        yield f"exclude {exclude!r}, an expression for whole paths, matches no module; names are given as a list"
    elif exclude and containers.issuperset(matched):
        below = rf"{re.escape(matched[0])}\..*"
        yield (
            f"exclude {exclude!r} matches only modules that contain others ({', '.join(matched[:LISTED])}) and leaves "
            f"nothing out; for what lies under them use {below!r} or the list {[matched[0]]}"
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
        return f"no kind of layer serves {type(module).__name__}; served are {', '.join(_served())}"
    shape = getattr(getattr(module, "weight", None), "shape", ())
    if len(shape) > 1 and 0 in shape:  # what DeepSpeed leaves in a weight's place has one dimension
        return f"its weight is empty ({' x '.join(map(str, shape))})"
    return kind.refusal(module)


def _served() -> list[str]:
    return [kind.name for kind in KINDS]


def _is_linear(module: nn.Module) -> bool:
    kind = kind_of(module)
    return kind is not None and kind.name in ("linear", "attention")


def _heads(modules: dict[str, nn.Module]) -> set[str]:
    """Paths of output heads: what transformers calls output embeddings, or a head by its usual name.

    The model may hold transformers' models, as a LightningModule does: each has a head of its own.
    """
    heads: set[str] = set()
    outer: list[str] = []
    for path, module in modules.items():
        get_head = getattr(module, "get_output_embeddings", None)
        if not callable(get_head) or any(path.startswith(prefix) for prefix in outer):
            continue
        prefix = f"{path}." if path else ""
        outer.append(prefix)
        head = get_head()
        if head is not None:
            head = plain(head)
            heads |= {other for other, module in modules.items() if module is head}
        else:
            inside = (other for other in modules if other.startswith(prefix))
            heads |= {other for other in inside if other.removeprefix(prefix).split(".")[0] in HEAD_NAMES}
    return heads


def _adaptable(modules: dict[str, nn.Module]) -> list[str]:
    """Last names of the modules that some kind serves."""
    return sorted({path.rpartition(".")[2] for path in modules if kind_of(modules[path]) is not None})


def _suggestion(name: str, modules: dict[str, nn.Module]) -> str:
    names = _adaptable(modules)
    close = difflib.get_close_matches(name.rpartition(".")[2], names, n=3)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; modules that can be adapted here: {', '.join(names[:12]) or 'none'}"


def _nothing(
    config: AdapterConfig, modules: dict[str, nn.Module], selection: Selection, left_out: dict[str, str]
) -> str:
    if left_out:
        why = " and ".join(sorted(set(left_out.values())))
        return f"nothing is left to adapt: all {len(left_out)} modules that targets match are taken out by {why}"
    if config.targets == ALL_LINEAR:
        reasons = "".join(f"; {path}: {reason}" for path, reason in list(selection.left_alone.items())[:5])
        others = _adaptable({path: m for path, m in modules.items() if path not in selection.left_alone})
        advice = f"; name other layers in targets: {', '.join(others[:12])}" if others else ""
        return f"the model has no linear layer to adapt{reasons}{advice}"
    if isinstance(config.targets, str):
        return (
            f"{config.targets!r}, an expression for whole paths, matches no module that can be adapted; names are "
            f"given as a list; here they are {', '.join(_adaptable(modules)[:12]) or 'none'}"
        )
    wanted = ", ".join(config.targets)
    return f"{wanted!r} matches no module that can be adapted{_suggestion(wanted, modules)}"


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
