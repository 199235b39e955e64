"""Files that are in a folder here, or on the model hub under a name such as ``user/model``."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

from doratune.errors import AdapterError, first_line
from doratune.extras import installed, require

NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
OF_AN_ADAPTER = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
"""The adapter, what ``doratune train`` notes beside it, tokenizers and image settings."""


def is_path(name: str) -> bool:
    """Whether a name can be a path only, and none of the hub's."""
    return name.startswith((".", "~", "/")) or name.count("/") > 1


def base_folder(name: str) -> Path:
    """Where a base model's weights are: a folder or file, or what the hub has under a name.

    Raises:
        AdapterError: if there is neither.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if is_path(name):
        raise AdapterError(f"base {name} does not exist; name a folder with safetensors files, or a model of the hub")
    return _download(f"base {name}", name, ("*.safetensors", "*.json"))


def adapter_folder(name: str | os.PathLike[str]) -> Path:
    """Where an adapter's files are: a folder, or what the hub has under a name.

    What can only be a folder comes back as it is, whether it exists or not: whoever reads it says what is missing.

    Raises:
        AdapterError: if there is no such folder, and the hub has no such name or cannot be asked.
    """
    path, text = Path(name).expanduser(), os.fspath(name)
    # Of `run/adaptor` beside a folder `run` the second part is mistyped.
    if path.exists() or not NAME.fullmatch(text) or path.parent.exists():
        return path
    if not installed("huggingface_hub"):
        raise AdapterError(
            f"{text} does not exist; name a folder, or, to have it looked for on the model hub: pip install "
            "'doratune[train]'"
        )
    return _download(text, text, tuple(OF_AN_ADAPTER))


@functools.cache
def _download(what: str, name: str, patterns: tuple[str, ...]) -> Path:
    hub = require("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # whatever an absent model or an absent network makes it raise
        raise AdapterError(
            f"{what}: there is no folder of that name, so it was looked for on the model hub: "
            f"{first_line(error)}; without a network, name a folder"
        ) from error
