"""``adapter_config.json``: PEFT's options to ours and back; each one is honoured or refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from doratune.config import ALL_LINEAR, AdapterConfig
from doratune.errors import AdapterError
from doratune.targets import as_targets, matches, plain_modules

HARMLESS_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Start values that left W alone: the trained tensors say everything."""

REFUSED = {
    "layer_replication": "it repeats layers of the model",
    "lora_bias": "B has no bias here",
    "target_parameters": "it adapts bare parameters, which are not modules",
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
HONOURED = {
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
}

TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


@dataclass(frozen=True)
class PeftOptions:
    """What a file's ``adapter_config.json`` says."""

    config: AdapterConfig
    layers_to_transform: list[int] | None
    layers_pattern: list[str]

    def targeted(self, model: nn.Module) -> set[str]:
        """Paths of the modules that PEFT would adapt on this model."""
        config = self.config
        found = set()
        for path in plain_modules(model):
            if not path or matches(path, config.exclude):
                continue
            if any(re.match(rf"(^|.*\.){saved}($|\..*)", path) for saved in config.modules_to_save):
                continue
            if matches(path, config.targets) and self._layer_chosen(path):
                found.add(path)
        return found

    def _layer_chosen(self, path: str) -> bool:
        """PEFT's rule: the first numbered part of the path is the layer's index."""
        if self.layers_to_transform is None or isinstance(self.config.targets, str) or path in self.config.targets:
            return True
        expressions = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        for expression in expressions:
            found = re.match(expression, path)
            if found:
                return int(found.group(1)) in self.layers_to_transform
        return False


def from_peft(raw: dict[str, Any], where: str) -> PeftOptions:
    """Read PEFT's options.

    Raises:
        AdapterError: naming every field that is missing, of the wrong type, or that cannot be honoured.
    """
    problems: list[str] = []
    method = raw.get("peft_type")
    if method != "LORA":
        raise AdapterError(f"{where}: peft_type: expected 'LORA', found {method!r}")
    for name, value in raw.items():
        if name in REFUSED and value:
            problems.append(f"{name}={value!r} is not supported: {REFUSED[name]}")
        elif name not in REFUSED and name not in WITHOUT_EFFECT and name not in HONOURED and value:
            problems.append(f"unknown option {name}={value!r}")
    init = raw.get("init_lora_weights", True)
    if init not in HARMLESS_INITS:
        problems.append(
            f"init_lora_weights={init!r} is not supported: it changed W, and the file does not hold that change; "
            "convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    targets = raw.get("target_modules")
    if not targets or not isinstance(targets, str | list):
        problems.append(f"target_modules: expected names or an expression, found {targets!r}")
        targets = ["?"]
    if targets == ALL_LINEAR:
        problems.append(f"target_modules: {ALL_LINEAR!r} must be written out as names in a file")
    indices = raw.get("layers_to_transform")
    pattern = raw.get("layers_pattern") or []
    fields = {
        "method": "dora" if raw.get("use_dora") else "lora",
        "rank": raw.get("r", 8),
        "alpha": raw.get("lora_alpha", 8),
        "dropout": raw.get("lora_dropout", 0.0),
        "targets": targets,
        "exclude": raw.get("exclude_modules") or (),
        "rank_pattern": raw.get("rank_pattern") or {},
        "alpha_pattern": raw.get("alpha_pattern") or {},
        "rank_stabilized": bool(raw.get("use_rslora", False)),
        "bias": raw.get("bias", "none"),
        "modules_to_save": raw.get("modules_to_save") or (),
    }
    config = None
    try:
        config = AdapterConfig(**fields)
    except AdapterError as error:
        problems.extend(line.strip(" -") for line in str(error).split("\n") if "problems):" not in line)
    except (TypeError, ValueError) as error:
        problems.append(f"a field has the wrong type ({error})")
    if problems or config is None:
        raise AdapterError.of(where, problems)
    return PeftOptions(
        config,
        [indices] if isinstance(indices, int) else list(indices) if indices else None,
        [pattern] if isinstance(pattern, str) else list(pattern),
    )


def to_peft(model: nn.Module, config: AdapterConfig, paths: Iterable[str], transposed: bool) -> dict[str, Any]:
    """PEFT's options for an adapter on the modules at ``paths``.

    PEFT knows no rank 0: a magnitude-only module is written with rank 1 and zeros.
    """
    name = type(model).__name__
    return {
        "peft_type": "LORA",
        "task_type": next((task for end, task in TASKS.items() if name.endswith(end)), None),
        "auto_mapping": {"base_model_class": name, "parent_library": type(model).__module__},
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "revision": None,
        "inference_mode": True,
        "r": max(1, config.rank),
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": as_targets(list(paths), plain_modules(model)),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {key: max(1, rank) for key, rank in config.rank_pattern.items()},
        "alpha_pattern": dict(config.alpha_pattern),
        "use_rslora": config.rank_stabilized,
        "use_dora": config.method == "dora",
        "fan_in_fan_out": transposed,
        "bias": config.bias,
        "modules_to_save": list(config.modules_to_save) or None,
        "init_lora_weights": True,
    }


def with_own_options(config: AdapterConfig, own: dict[str, Any]) -> AdapterConfig:
    """Add what only doratune's files say (in the weights' metadata): rank 0 and the norm's gradient."""
    ranks = {f"^{re.escape(path)}": 0 for path in own.get("magnitude_only", [])}
    return replace(
        config,
        norm_gradient=own.get("norm_gradient", config.norm_gradient),
        init=own.get("init", config.init),
        rank_pattern={**ranks, **config.rank_pattern},
    )
