"""Adapters in diffusers' own files, which ``pipe.load_lora_weights(folder)`` reads, magnitudes and all.

    import doratune as dt

    dt.diffusers.save_adapter({"unet": pipe.unet, "text_encoder": pipe.text_encoder}, "my-style")
    dt.diffusers.load_adapter({"unet": pipe.unet, "text_encoder": pipe.text_encoder}, "my-style")

PEFT's parts and options, for several models in one file: the name of each in the pipeline comes before its keys.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from doratune.checkpoint import inexpressible
from doratune.contents import PREFIX
from doratune.distributed import writes
from doratune.errors import AdapterError
from doratune.files import DIFFUSERS_WEIGHTS, write_weights
from doratune.interop.several import (
    Adapter,
    Models,
    Part,
    adapters,
    attach_parts,
    checked,
    grouped,
    options_for,
    rank_by_shape,
    read_one_file,
)
from doratune.peft_config import from_peft, to_peft
from doratune.renamed import todays_names
from doratune.targets import plain_modules

__all__ = ["load_adapter", "save_adapter"]

METADATA = "lora_adapter_metadata"
EXAMPLE = '{"unet": pipe.unet, "text_encoder": pipe.text_encoder}'
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
PARTS = {
    A: A,
    B: B,
    MAGNITUDE: MAGNITUDE,
    f"{MAGNITUDE}.weight": MAGNITUDE,
    "lora.down.weight": A,
    "lora.up.weight": B,
    "lora_linear_layer.down.weight": A,
    "lora_linear_layer.up.weight": B,
}
"""What diffusers, in its earlier versions and today, calls PEFT's parts."""
KEY = re.compile(rf"(?P<path>.+)\.(?P<part>{'|'.join(re.escape(part) for part in PARTS)})", re.DOTALL)
WRITTEN_FOR_TEXT = {
    A: "lora_linear_layer.down.weight",
    B: "lora_linear_layer.up.weight",
    MAGNITUDE: f"{MAGNITUDE}.weight",
}
"""The names by which diffusers knows a text encoder's file. With ``.weight`` transformers, too, which then reads it for
diffusers, takes the magnitudes."""
WRITTEN = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern")
Given = TypeVar("Given", bound=Models)


def load_adapter(
    models: Given, source: str | os.PathLike[str], name: str = "default", *, trainable: bool = False
) -> Given:
    """Attach the adapters of a file to their models, all or none, and make them the active ones.

    Args:
        models: parts of a pipeline by their names there (``unet`` or ``transformer``, ``text_encoder``,
            ``text_encoder_2``); None leaves a part of the file out; ``""`` is the name where a file has none.
        source: a folder with ``pytorch_lora_weights.safetensors``, or a safetensors file.
        name: what to call the adapters here.
        trainable: True to go on training them.

    Returns:
        The same models.

    Raises:
        AdapterError: listing the problems by key, the first ten of many; the models are then unchanged.
    """
    path = Path(source).expanduser()
    file = path / DIFFUSERS_WEIGHTS if path.is_dir() else path
    given = checked(models, EXAMPLE)
    tensors, metadata = read_one_file(file)
    problems: list[str] = []
    options = _options(metadata, given, problems)
    layers = _sorted(given, tensors, problems)
    parts = [
        part
        for prefix, model in given.items()
        if model is not None and (part := _part(prefix, model, layers[prefix], options.get(prefix), problems))
    ]
    attach_parts(file, parts, problems, name, trainable=trainable)
    return models


def _options(metadata: dict[str, str], models: Models, problems: list[str]) -> dict[str, dict[str, Any]]:
    """PEFT's options for each model, where the file has them."""
    try:
        raw = json.loads(metadata.get(METADATA, "{}"))
        items = raw.items()
    except (ValueError, AttributeError, RecursionError) as error:
        problems.append(f"metadata {METADATA!r}: expected a JSON object ({error})")
        return {}
    found: dict[str, dict[str, Any]] = {}
    for key, value in items:
        for prefix in models:
            start = f"{prefix}." if prefix else ""
            if key.startswith(start):
                found.setdefault(prefix, {"peft_type": "LORA"})[key.removeprefix(start)] = value
    return found


def _sorted(
    models: Models, tensors: dict[str, Tensor], problems: list[str]
) -> dict[str, dict[str, dict[str, tuple[str, Tensor]]]]:
    """The tensors by prefix, layer's path and PEFT's part, each with its key; the others go to ``problems``."""
    layers: dict[str, dict[str, dict[str, tuple[str, Tensor]]]] = {prefix: {} for prefix in models}
    findings: list[tuple[str, str]] = []
    for key, tensor in tensors.items():
        prefix = next((p for p in models if not p or key.startswith(f"{p}.")), None)
        match = None if prefix is None else KEY.fullmatch(key[len(prefix) :].lstrip("."))
        if prefix is None:
            findings.append((key, _why_no_model(key, models)))
        elif models[prefix] is None:
            continue
        elif match is None:
            findings.append((key, f"unknown key; expected it to end in one of {', '.join(PARTS)}"))
        elif PARTS[match["part"]] in layers[prefix].setdefault(match["path"], {}):
            findings.append((key, "the file holds this tensor twice, under two keys"))
        else:
            layers[prefix][match["path"]][PARTS[match["part"]]] = key, tensor
    problems += grouped(findings)
    for prefix, model in models.items():
        if model is not None and not any(not prefix or key.startswith(f"{prefix}.") for key in tensors):
            problems.append(f"{prefix}: the file holds nothing for it; leave it out of models")
    return layers


def _why_no_model(key: str, models: Models) -> str:
    if re.match(r"(lora_[a-z]+\d?|lycoris)_.*\.(lora_(down|up)\.weight|alpha|dora_scale)", key):
        return "kohya's names; use dt.kohya.load_adapter"
    known = re.match(r"(unet|transformer(?:_\d+)?|text_encoder(?:_\d+)?)\.", key)
    if known is None:
        return f"begins with none of {', '.join(models)}; a model whose keys have no such name is called ''"
    return f"models has no {known[1]!r}; add it with its model, or with None to leave this part of the file out"


def _part(
    prefix: str,
    model: nn.Module,
    layers: dict[str, dict[str, tuple[str, Tensor]]],
    raw: dict[str, Any] | None,
    problems: list[str],
) -> Part | None:
    """What the file holds for one model in PEFT's terms; options that cannot be read go to ``problems``."""
    if not layers:
        return None
    today = {} if raw else todays_names(model, layers, plain_modules(model))  # with options, later, and they as well
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    scales: dict[str, tuple[int, float]] = {}
    for former, parts in layers.items():
        path = today.get(former, former)
        names[path] = f"{prefix}.{former}".lstrip(".")
        names.update({f"{PREFIX}{path}.{part}": f"{names[path]}.{part}" for part in (A, B, MAGNITUDE)})
        for part, (key, tensor) in parts.items():
            tensors[f"{PREFIX}{path}.{part}"], names[f"{PREFIX}{path}.{part}"] = tensor, key
        rank = rank_by_shape(*(parts[part][1] if part in parts else None for part in (A, B)))
        scales[path] = rank, float(rank)
    try:
        options = (
            from_peft(raw, prefix) if raw else options_for(model, scales, any(MAGNITUDE in p for p in layers.values()))
        )
    except AdapterError as error:
        found = (problem.removeprefix(f"{prefix}: ") for problem in error.problems)
        problems += [f"metadata {METADATA!r}, {prefix}.{problem}" for problem in found]
        return None
    return Part(model, options, tensors, names)


def save_adapter(models: Models, folder: str | os.PathLike[str], name: str = "default") -> None:
    """Write the adapters of several models to ``pytorch_lora_weights.safetensors`` in a folder, whole or not at all.

    A layer without a change of direction (rank 0) is written with rank 1 and zeros. What diffusers would not read is
    refused: what PEFT cannot express, trained biases, modules trained whole, embeddings.

    Args:
        models: as for ``load_adapter``.
        folder: made if it is not there.
        name: of the adapters.

    Raises:
        AdapterError: listing what cannot be written, or if the folder cannot be.
    """
    given = checked(models, EXAMPLE)
    problems: list[str] = []
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    found = adapters(given, name, problems)
    for prefix, adapter in found.items():
        start = f"{prefix}." if prefix else ""
        own: list[str] = [f"{path}: {reason}" for reason, path in inexpressible(adapter.model, name).items()]
        tensors.update({start + key: tensor for key, tensor in _to_file(prefix, adapter, own).items()})
        config = next(iter(adapter.layers.values())).adapters[name].config
        try:
            options = to_peft(adapter.model, config, adapter.layers, [], False)
        except AdapterError as error:
            own += error.problems
        else:
            if options["target_parameters"]:
                own.append(f"{', '.join(options['target_parameters'])}: diffusers has no place for fused experts")
            chosen = (*WRITTEN, *(option for option in ("use_dora", "use_rslora") if options[option]))
            metadata.update({start + option: options[option] for option in chosen})
        problems += [start + problem for problem in own]
    if problems:
        raise AdapterError.of(f"adapter {name!r} cannot be saved to {folder}", problems)
    if all(writes(adapter.model) for adapter in found.values()):
        write_weights(Path(folder) / DIFFUSERS_WEIGHTS, tensors, {METADATA: json.dumps(metadata, indent=2)})


def _to_file(prefix: str, adapter: Adapter, problems: list[str]) -> dict[str, Tensor]:
    """One model's tensors under the file's keys, without the prefix; what has no place goes to ``problems``."""
    written = WRITTEN_FOR_TEXT if prefix.startswith("text_encoder") else {MAGNITUDE: f"{MAGNITUDE}.weight"}
    tensors: dict[str, Tensor] = {}
    without_place: list[str] = []
    for key, tensor in adapter.tensors.items():
        match = KEY.fullmatch(key.removeprefix(PREFIX))
        if match is None or match["path"] not in adapter.layers:
            without_place.append(key.removeprefix(PREFIX))
        else:
            tensors[f"{match['path']}.{written.get(match['part'], match['part'])}"] = tensor
    reason = "is of a trained bias, a module trained whole or an embedding, which diffusers does not read"
    problems += grouped((key, reason) for key in without_place)
    return tensors
