"""``adapter_config.json``: PEFT's options to ours and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from doratune.config import ALL_LINEAR, AdapterConfig, matches
from doratune.errors import AdapterError, shown
from doratune.layers.experts import ExpertProjection
from doratune.peft_fields import OWN_TYPE, PEFT_TYPE, read_fields
from doratune.targets import as_targets, plain_modules

WRAPPER_PARTS = ("base_layer", "lora_dropout", "lora_A", "lora_B", "lora_magnitude_vector", "lora_A.default")
"""Modules that PEFT puts inside an adapted one, where its search for modules_to_save meets them."""
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
HEADS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}
"""Modules that PEFT takes for saved because of the task alone."""


@dataclass(frozen=True)
class PeftOptions:
    """What a file's ``adapter_config.json`` says."""

    config: AdapterConfig
    layers_to_transform: list[int] | None
    layers_pattern: list[str]
    own_type: bool = False
    """Written by doratune for layers that PEFT cannot express."""
    parameters: Sequence[str] = ()
    """PEFT's ``target_parameters``, which mean fused experts."""
    modules_alone: str | Sequence[str] | None = None
    """PEFT's ``target_modules`` where there are parameters, too; the config's targets are both."""

    @property
    def modules(self) -> str | Sequence[str]:
        """PEFT's ``target_modules``, which never mean experts."""
        return self.config.targets if self.modules_alone is None else self.modules_alone

    def targeted(self, model: nn.Module) -> set[str]:
        """Paths of the modules that PEFT would adapt on this model."""
        config = self.config
        found = set()
        for path, module in plain_modules(model).items():
            if isinstance(module, ExpertProjection) and not self.own_type:
                if matches(path, self.parameters):
                    found.add(path)
                continue
            if not path or matches(path, config.exclude):
                continue
            if any(re.match(rf"(^|.*\.){saved}($|\..*)", path) for saved in config.modules_to_save):
                continue
            if matches(path, self.modules) and self._layer_chosen(path):
                found.add(path)
        return found

    def _layer_chosen(self, path: str) -> bool:
        """PEFT's rule: the first numbered part of the path is the layer's index."""
        if self.layers_to_transform is None or isinstance(self.modules, str) or path in self.modules:
            return True
        numbered = r"\.(?P<doratune_index>\d+)\."
        for expression in [rf"(?:^|.*?\.){p}" for p in self.layers_pattern] or [r".*?\.[^.]*"]:
            found = re.match(expression + numbered, path)
            if found:
                return int(found["doratune_index"]) in self.layers_to_transform
        return False


def saved_by_peft(names: Iterable[str], paths: Iterable[str]) -> set[str]:
    """The modules that PEFT saves for ``modules_to_save``: the end of the path decides, dots or not."""
    ends = tuple(names)
    return {path for path in paths if path and path.endswith(ends)}


def from_peft(raw: dict[str, Any], where: str) -> PeftOptions:
    """Read PEFT's options.

    Raises:
        AdapterError: naming every field that is missing, of the wrong type, or that cannot be honoured.
    """
    if raw.get("peft_type") not in (PEFT_TYPE, OWN_TYPE):
        raise AdapterError(f"{where}: peft_type: expected {PEFT_TYPE!r}, found {shown(raw.get('peft_type'))}")
    problems: list[str] = []
    values = read_fields(raw, problems)
    parameters = values["target_parameters"] or []
    targets, indices, pattern = values["target_modules"], values["layers_to_transform"], values["layers_pattern"] or []
    if targets == ALL_LINEAR:
        problems.append(f"target_modules: {ALL_LINEAR!r} must be written out as names in a file")
    if isinstance(targets, str) and indices is not None:
        problems.append("layers_to_transform: cannot be used when target_modules is a regular expression")
    if problems:
        raise AdapterError.of(where, problems)
    config = AdapterConfig(
        method="dora" if values["use_dora"] else "lora",
        rank=values["r"],
        alpha=values["lora_alpha"],
        dropout=values["lora_dropout"],
        targets=_with_parameters(targets, parameters),
        exclude=values["exclude_modules"] or (),
        rank_pattern=values["rank_pattern"],
        alpha_pattern=values["alpha_pattern"],
        rank_stabilized=values["use_rslora"],
        bias=values["bias"],
        modules_to_save=values["modules_to_save"] or (),
    )
    if isinstance(indices, int):
        indices = [indices]
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    own_type = raw["peft_type"] == OWN_TYPE
    return PeftOptions(config, indices or None, patterns, own_type, parameters, targets if parameters else None)


def _with_parameters(targets: str | list[str], parameters: list[str]) -> str | list[str]:
    """``target_modules`` and ``target_parameters`` as one: names of experts' parameters are names of layers here."""
    if isinstance(targets, str) and parameters:
        return f"{targets}|(.*\\.)?({'|'.join(map(re.escape, parameters))})"
    return targets if isinstance(targets, str) else [*targets, *parameters]


def to_peft(
    model: nn.Module,
    config: AdapterConfig,
    paths: Iterable[str],
    saved: Iterable[str],
    transposed: bool,
    own_type: bool = False,
) -> dict[str, Any]:
    """PEFT's options for an adapter on the modules at ``paths``, with those at ``saved`` saved whole.

    PEFT knows no rank 0: a magnitude-only module is written with rank 1 and zeros. ``own_type``: for doratune only.

    Raises:
        AdapterError: if PEFT's options cannot name exactly these modules.
    """
    modules = plain_modules(model)
    adapted, whole = set(paths), set(saved)
    experts = {path for path in adapted if isinstance(modules[path], ExpertProjection) and not own_type}
    names = list(config.modules_to_save)
    if saved_by_peft(names, modules) != whole:
        names = sorted(whole)
    inner = [f"{path}.{part}" for path in adapted for part in WRAPPER_PARTS]
    more = sorted(saved_by_peft(names, [*modules, *inner]) - whole)
    task = next((task for end, task in TASKS.items() if type(model).__name__.endswith(end)), None)
    if task in HEADS and not saved_by_peft(HEADS[task], modules) <= whole:
        task = None  # or else PEFT would look for the head in the file
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        task = None  # PEFT's models for tasks hand on input_ids, which a Whisper does not take
    raw = {
        "peft_type": OWN_TYPE if own_type else PEFT_TYPE,
        "task_type": task,
        "auto_mapping": None
        if task
        else {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "revision": None,
        "inference_mode": True,
        "r": max(1, config.rank),
        "lora_alpha": _plain_number(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": as_targets(sorted(adapted - experts), modules) if adapted - experts else [],
        "target_parameters": _parameter_names(experts, modules) or None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {key: max(1, rank) for key, rank in config.rank_pattern.items()},
        "alpha_pattern": {key: _plain_number(alpha) for key, alpha in config.alpha_pattern.items()},
        "use_rslora": config.rank_stabilized,
        "use_dora": config.method == "dora",
        "fan_in_fan_out": transposed,
        "bias": config.bias,
        "modules_to_save": names or None,
        "init_lora_weights": True,
    }
    problems = [f"modules_to_save: by its name PEFT would save {path} as well" for path in more]
    problems += [
        f"{path}: PEFT would not adapt it, as its path fits a name in modules_to_save"
        for path in sorted(adapted - from_peft(raw, "PEFT's format").targeted(model))
    ]
    if problems:
        raise AdapterError.of("PEFT's format cannot hold this adapter", problems)
    return raw


def _parameter_names(paths: set[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """The shortest ``target_parameters`` that mean these experts only."""
    short = sorted({".".join(path.split(".")[-2:]) for path in paths})
    found = {p for p, module in modules.items() if isinstance(module, ExpertProjection) and matches(p, short)}
    return short if found == paths else sorted(paths)


def _plain_number(value: float) -> float:
    """32.0 as 32: PEFT's own files hold whole numbers."""
    return int(value) if float(value).is_integer() else value
