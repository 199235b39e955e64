"""The fields of PEFT's ``adapter_config.json``: what may stand in each, which are refused, which say nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from doratune.errors import shown

PEFT_TYPE = "LORA"
OWN_TYPE = "DORATUNE"
"""``peft_type`` of an adapter that PEFT cannot express: the same files, which PEFT refuses by this name."""
MOST_RANKS = 2**20
HARMLESS_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""Start values that left W alone: the trained tensors say everything."""

REFUSED = {
    "layer_replication": "it repeats layers of the model",
    "lora_bias": "B has no bias here",
    "trainable_token_indices": "it trains single rows of the embedding",
    "ensure_weight_tying": "adapters of tied weights lie on different axes and are not tied here",
    "megatron_config": "it belongs to Megatron's layers",
    "alora_invocation_tokens": "an activated LoRA acts on part of the tokens only",
    "use_qalora": "it pools the layer's input",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes between adapters",
    "kasa_config": "it changes W",
    "velora_config": "it changes the backward pass",
    "monteclora_config": "it samples its factors",
    "loftq_config": "it changes W",
    "corda_config": "it changes W",
    "lora_ga_config": "it changes W",
}
"""Options that change what the adapter means and that doratune does not have."""

WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "fan_in_fan_out",  # decided by the layer's type
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= MOST_RANKS


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e38 and math.isfinite(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_expression(value: Any, form: str = "{}") -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(form.format(value)))
    except (re.error, OverflowError, RecursionError):
        return False


def _is_pattern(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(_is_expression(k, r"(.*\.)?({})$") and of(v) for k, v in value.items())


def _is_indices(value: Any) -> bool:
    return type(value) is int or (isinstance(value, list) and all(type(index) is int for index in value))


def _is_layers_pattern(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    return isinstance(names, list) and all(_is_expression(name, r"(?:^|.*?\.){}\.(\d+)\.") for name in names)


def _is_saved(value: Any) -> bool:
    return _is_names(value) and all(_is_expression(name, r"(^|.*\.){}($|\..*)") for name in value)


@dataclass(frozen=True)
class _Field:
    """One honoured field of the file: what it is when absent, what may stand in it."""

    default: Any
    accepts: Callable[[Any], bool]
    expected: str
    nullable: bool = True


NAMES = "names of modules, or a regular expression"
HONOURED = {
    "peft_type": _Field(PEFT_TYPE, lambda v: v in (PEFT_TYPE, OWN_TYPE), PEFT_TYPE, False),
    "r": _Field(8, _is_rank, f"a whole number from 1 to {MOST_RANKS}", False),
    "lora_alpha": _Field(8, _is_alpha, "a finite number above 0", False),
    "lora_dropout": _Field(0.0, lambda v: type(v) in (int, float) and 0 <= v < 1, "at least 0 and below 1", False),
    "target_modules": _Field(None, lambda v: bool(v) and (_is_names(v) or _is_expression(v)), NAMES, False),
    "exclude_modules": _Field(None, lambda v: _is_names(v) or _is_expression(v), NAMES),
    "target_parameters": _Field(None, _is_names, "names of parameters"),
    "rank_pattern": _Field({}, lambda v: _is_pattern(v, _is_rank), "names or regular expressions with a rank each"),
    "alpha_pattern": _Field({}, lambda v: _is_pattern(v, _is_alpha), "names or regular expressions with a number each"),
    "use_rslora": _Field(False, lambda v: type(v) is bool, "true or false"),
    "use_dora": _Field(False, lambda v: type(v) is bool, "true or false"),
    "bias": _Field("none", lambda v: v in ("none", "all", "lora_only"), "none, all or lora_only", False),
    "modules_to_save": _Field(None, _is_saved, "names of modules"),
    "layers_to_transform": _Field(None, _is_indices, "a whole number or several"),
    "layers_pattern": _Field(None, _is_layers_pattern, "a name or several"),
    "init_lora_weights": _Field(True, lambda v: True, "anything"),
}


def read_fields(raw: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """The honoured fields with their values; what is missing, wrong or cannot be honoured goes to ``problems``."""
    for name, value in raw.items():
        if name in REFUSED and value:
            problems.append(f"{name}={shown(value)} is not supported: {REFUSED[name]}")
        elif name not in REFUSED and name not in WITHOUT_EFFECT and name not in HONOURED and value:
            problems.append(f"unknown option {shown(name)}: found {shown(value)}")
    values: dict[str, Any] = {}
    for name, rule in HONOURED.items():
        value = raw.get(name, rule.default)
        if value is None and rule.nullable:
            value = rule.default
        elif name == "target_modules" and not value and raw.get("target_parameters"):
            value = []
        elif not rule.accepts(value):
            problems.append(f"{name}: expected {rule.expected}, found {shown(value)}")
        values[name] = value
    init = values["init_lora_weights"]
    if init not in HARMLESS_INITS:
        problems.append(
            f"init_lora_weights={shown(init)} is not supported: it may have changed W, and the file does not hold "
            "that change; convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    return values
