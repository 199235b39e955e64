"""Modules that PEFT takes for something else: dense MLPs beside fused experts.

transformers 5 keeps the experts of a mixture in one parameter. For such models PEFT reads the old names of their parts
(``gate_proj``) as that parameter, wherever the module of that name lies: a file that names a dense or shared MLP adapts
the experts there (PEFT 0.21, ``_convert_peft_config_moe``). No spelling of the path gets around it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import nn

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
