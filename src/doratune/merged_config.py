"""What a transformers model notes about its weights, put right after merging: which are quantised, which are tied."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from doratune.layers.quantised import library_of
from doratune.layers.weights import is_transformers_conv1d
from doratune.targets import shared_parameters


def forget_quantisation(root: nn.Module) -> None:
    """A transformers model without a quantised layer left is saved and loaded as a plain one, others as they are."""
    config = getattr(root, "config", None)
    if not hasattr(config, "quantization_config"):
        return
    # When it saves, transformers would undo how it read quantised weights, and for bitsandbytes' 4 bits it cannot.
    if conversions := getattr(root, "_weight_conversions", None):
        root._weight_conversions = [c for c in conversions if _can_be_undone(c)]  # type: ignore[assignment]
    if any(library_of(m) for m in root.modules()):
        _name_plain_layers(root, config.quantization_config)  # type: ignore[union-attr]
        return
    del config.quantization_config  # type: ignore[union-attr]
    for name, value in (("is_quantized", False), ("hf_quantizer", None), ("quantization_method", None)):
        if hasattr(root, name):
            setattr(root, name, value)
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "_hf_peft_config_loaded"):
        if getattr(root, name, False):
            setattr(root, name, False)


def _can_be_undone(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def _name_plain_layers(root: nn.Module, options: Any) -> None:
    """List the linear layers that are not quantised; a list replaces transformers' own, which leaves out the head."""
    linear = [p for p, m in root.named_modules() if isinstance(m, nn.Linear) or is_transformers_conv1d(m)]
    plain = [path for path in linear if library_of(root.get_submodule(path)) is None]
    for name in ("llm_int8_skip_modules", "modules_to_not_convert"):  # bitsandbytes, torchao
        if hasattr(options, name):
            setattr(options, name, sorted({*(getattr(options, name) or ()), *plain}))


def tie_nothing(root: nn.Module) -> None:
    """Have a transformers model tie no embeddings.

    Its option is for all of them, so that those still tied (BART ties four) become separate weights, too: only one of
    them would be saved.
    """
    configs = [getattr(module, "config", None) for module in root.modules()]
    configs.append(getattr(configs[0], "text_config", None))
    configs = [config for config in configs if hasattr(config, "tie_word_embeddings")]
    if not configs:
        return
    for config in configs:
        config.tie_word_embeddings = False  # type: ignore[union-attr]
    for _, *others in shared_parameters(root).values():
        for module, name in others:
            module._parameters[name] = copy.deepcopy(module._parameters[name])
