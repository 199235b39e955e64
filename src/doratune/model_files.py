"""A whole model's files, for other programs and other users of the machine as well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from doratune.files import write_whole

FILE = "config.json"
BESIDE = ("rope_theta", "partial_rotary_factor")
"""What stood in the config itself; the rest was called ``rope_scaling``."""


def save_model(model: Any, folder: Path) -> None:
    """Write a transformers model, ``config.json`` and safetensors."""
    model.save_pretrained(folder)
    name_rope_twice(folder)
    usual = (folder / FILE).stat().st_mode
    for weights in folder.glob("*.safetensors"):
        weights.chmod(usual)  # safetensors 0.8 makes files that nobody but their owner may read, such as a server


def name_rope_twice(folder: Path) -> None:
    """Write the older names of a saved model's rotary positions beside today's; transformers 5 takes both.

    transformers 5 puts all that they need into ``rope_parameters``. Who looks for the ``rope_theta`` of transformers 4
    takes a default instead, without a word (mlx-lm 0.32 with a Llama): the model is then another one.
    """
    path = folder / FILE
    config = json.loads(path.read_text(encoding="utf-8"))
    changed = [_name_twice(part) for part in (config, config.get("text_config")) if isinstance(part, dict)]
    if any(changed):
        write_whole(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _name_twice(config: dict[str, Any]) -> bool:
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:  # those of kinds of layers had no names in common
        return False
    older = {name: rope[name] for name in BESIDE if name in rope}
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {name: value for name, value in rope.items() if name not in BESIDE}
    missing = {name: value for name, value in older.items() if name not in config}
    config.update(missing)
    return bool(missing)
