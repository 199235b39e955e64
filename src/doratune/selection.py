"""Which modules of a model an adapter goes to, decided and checked before anything is changed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from doratune.config import ALL_LINEAR, AdapterConfig, matches, vain_options
from doratune.errors import AdapterError
from doratune.layers import Kind, Part, kind_of
from doratune.layers.bypass import held_aside, reader
from doratune.layers.holder import plain, plain_parameters
from doratune.targets import HEAD_NAMES, outermost, plain_modules, refusal, refuse_model

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
    problems.extend(_vain_targets(config.targets, modules))
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
    hosted = {path.rpartition(".")[0] for path in selection.layers if isinstance(modules[path], Part)}
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


def _vain_targets(targets: str | Sequence[str], modules: dict[str, nn.Module]) -> Iterator[str]:
    """Names that fit nothing."""
    for target in () if isinstance(targets, str) else targets:
        if not any(matches(path, [target]) for path in modules):
            yield f"target {target!r} matches no module{_suggestion(target, modules)}"


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
