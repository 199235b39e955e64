"""Libraries that come with an extra: imported when used, missed with a message that names the extra."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from doratune.errors import AdapterError


def require(module: str, extra: str = "train") -> Any:
    """Import a module of an optional library.

    Raises:
        AdapterError: if the library is not installed, naming the extra that brings it.
    """
    library = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != library:
            raise  # the library is there, something that it needs is not: its own message says more
        raise AdapterError(f"this needs {library}, which is not installed: pip install 'doratune[{extra}]'") from error


def installed(library: str) -> bool:
    """Whether a library can be imported, without importing it."""
    return importlib.util.find_spec(library) is not None
