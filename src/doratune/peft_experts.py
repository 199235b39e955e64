"""Mixtures whose experts transformers 5 keeps in one parameter, in PEFT's files.

LoRA on the experts (``target_parameters``): PEFT puts a wrapper around their module for every parameter it adapts, the
first parameter's innermost, so that a key names the module and not the parameter, and its B is ``[out, rank experts]``.

Dense MLPs beside them: PEFT reads the old names of the experts' parts (``gate_proj``) as that parameter, wherever the
module of that name lies. A file that names a dense or shared MLP adapts the experts there (PEFT 0.21,
``_convert_peft_config_moe``), and no spelling of the path gets around it.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping

from torch import Tensor, nn

from doratune.layers.experts import ExpertProjection

PARTS_OF_EXPERTS = {"mixtral": ("gate", "w1", "w2", "w3"), "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj")}
"""Names that PEFT redirects, by the kind of model whose layout the model has."""


def taken_for_experts(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """The paths that PEFT would redirect to the experts' parameters of this model."""
    names = PARTS_OF_EXPERTS.get(_layout(model), ())
    return [path for path in paths if path.rpartition(".")[2] in names]


def _layout(model: nn.Module) -> str:
    own = getattr(getattr(model, "config", None), "model_type", "")
    mapping = sys.modules.get("transformers.conversion_mapping")  # transformers 5 has it loaded with the model
    layouts = {"mixtral": "mixtral", **getattr(mapping, "_MODEL_TO_CONVERSION_PATTERN", {})}  # as in PEFT
    return layouts.get(own, "")


def expert_counts(modules: Mapping[str, nn.Module], paths: Collection[str]) -> dict[str, int]:
    """Of the paths those of fused experts, in the model's order, with the number of experts."""
    return {
        path: len(module.weight)
        for path, module in modules.items()
        if path in paths and isinstance(module, ExpertProjection)
    }


def to_parameters(tensors: Mapping[str, Tensor], experts: Mapping[str, int]) -> dict[str, Tensor]:
    """An adapter's tensors with those of fused experts as PEFT's files hold them: under its keys, B in its layout."""
    result = dict(tensors)
    moved: dict[str, Tensor] = {}
    for (a, b), (their_a, their_b), count in _keys(experts):
        moved[their_a] = result.pop(a)
        B = result.pop(b).unflatten(0, (count, -1))
        moved[their_b] = B.permute(1, 2, 0).flatten(1).contiguous()
    return result | moved


def from_parameters(tensors: Mapping[str, Tensor], experts: Mapping[str, int]) -> dict[str, Tensor]:
    """The opposite of ``to_parameters``; what is not there, or has another shape, is left to whoever checks it."""
    result = dict(tensors)
    moved: dict[str, Tensor] = {}
    for (a, b), (their_a, their_b), count in _keys(experts):
        if their_a in result:
            moved[a] = result.pop(their_a)
        if their_b in result:
            B = result.pop(their_b)
            fits = B.ndim == 2 and B.shape[1] % count == 0
            moved[b] = B.unflatten(1, (-1, count)).permute(2, 0, 1).flatten(0, 1) if fits else B
    return result | moved


def parameter_at(place: str, parameters: Collection[str]) -> str:
    """Path of the parameter whose factors lie at a place in PEFT's file; ``down_proj`` is every module's last."""
    module = place.removesuffix(".base_layer")
    names = {name.rpartition(".")[2] for name in parameters}
    outermost = names & {"down_proj"} if place == module else names - {"down_proj"}
    return f"{module}.{min(outermost or names)}"


def _keys(experts: Mapping[str, int]) -> Iterable[tuple[tuple[str, str], tuple[str, str], int]]:
    """Keys of A and B of each parameter, ours and PEFT's, with the number of experts."""
    by_module: dict[str, list[str]] = {}
    for path in experts:
        by_module.setdefault(path.rpartition(".")[0], []).append(path)
    for module, own in by_module.items():
        for depth, path in enumerate(reversed(own)):
            place = f"base_model.model.{module}" + ".base_layer" * depth
            names = ("lora_A.weight", "lora_B.weight")
            a, b = (f"base_model.model.{path}.{name}" for name in names)
            yield (a, b), (f"{place}.{names[0]}", f"{place}.{names[1]}"), experts[path]
