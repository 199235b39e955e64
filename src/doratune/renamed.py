"""Names that transformers has changed: files from its older versions, read into today's models.

transformers 5 moved and renamed parts of many models (LLaVA's ``language_model.model`` is ``model.language_model``,
ViT's ``query`` is ``q_proj``) and knows how to rename a checkpoint's keys. An adapter's keys follow the same rules.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn


def renamed(path: str, rules: Iterable[Any]) -> tuple[str, bool]:
    """A layer's path by transformers' rules, and whether one of them changes its weight, too."""
    key, changes = f"{path}.weight", False
    for rule in rules:
        key, applies = rule.rename_source_key(key)
        changes |= bool(applies) and hasattr(rule, "operations")
    return key.removesuffix(".weight"), changes


def todays_names(model: nn.Module, paths: Iterable[str], modules: Iterable[str]) -> dict[str, str]:
    """Today's path for each of ``paths`` that ``model``, whose modules are ``modules``, knows under another name.

    Empty unless that settles all of them: a file is of an older version as a whole, or it is of another model.
    """
    known = set(modules)
    unknown = sorted(path for path in paths if path not in known)
    mapping = sys.modules.get("transformers.conversion_mapping")  # transformers 5 has it loaded with the model
    rules = getattr(mapping, "get_model_conversion_mapping", None)
    if not unknown or rules is None:
        return {}
    steps = rules(model)
    found = {path: renamed(path, steps) for path in unknown}
    names = {path: name for path, (name, _) in found.items()}
    # A weight that is changed, too, is one that its adapter would have to follow.
    changed = any(changes for _, changes in found.values())
    settled = known.issuperset(names.values()) and len(set(names.values())) == len(names)
    return names if settled and not changed else {}
