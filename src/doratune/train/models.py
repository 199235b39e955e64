"""Base models and tokenizers from a folder or the hub, with errors that say what to do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from doratune.errors import AdapterError
from doratune.train.extras import require


def model_problem(name: str) -> str | None:
    """What is wrong with a model's name as far as one can see without loading it, or None."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            return f"model {name}: the folder has no config.json; name the folder of a transformers model"
        return None
    if folder.exists():
        return f"model {name} is a file; name the folder of a transformers model"
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        return f"model {name}: no such folder"
    return None


def load_model(name: str, dtype: torch.dtype | str = "auto", task: str | None = "CAUSAL_LM") -> Any:
    """Load a transformers model.

    Args:
        name: folder, or name on the hub; a folder never needs a network.
        dtype: of the weights; "auto": as they are stored.
        task: PEFT's task type; None, or one not listed here: the class that the model's own config names.

    Raises:
        AdapterError: if there is no such model or it cannot be loaded.
    """
    transformers = require("transformers")
    _raise_problem(name)
    options = {"local_files_only": True} if Path(name).expanduser().is_dir() else {}
    source = str(Path(name).expanduser()) if options else name
    try:
        if task == "CAUSAL_LM":
            loader = transformers.AutoModelForCausalLM
        else:
            architectures = transformers.AutoConfig.from_pretrained(source, **options).architectures
            loader = getattr(transformers, (architectures or ["AutoModel"])[0])
        return loader.from_pretrained(source, dtype=dtype, **options)
    except Exception as error:  # whatever a broken folder, an absent file or an absent network makes it raise
        raise AdapterError(_could_not_load("model", name, bool(options), error)) from error


def load_tokenizer(name: str) -> Any:
    """Load a model's tokenizer.

    Raises:
        AdapterError: if there is none or it cannot be loaded.
    """
    transformers = require("transformers")
    _raise_problem(name)
    options = {"local_files_only": True} if Path(name).expanduser().is_dir() else {}
    source = str(Path(name).expanduser()) if options else name
    try:
        return transformers.AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:
        raise AdapterError(_could_not_load("tokenizer", name, bool(options), error)) from error


def choose_dtype(wanted: str, full: bool = False) -> torch.dtype:
    """The dtype of the base weights; "auto" by what the machine has.

    Raises:
        AdapterError: for float16 without a GPU, where it is slow and overflows.
    """
    gpu = torch.cuda.is_available()
    if wanted == "auto":
        return torch.bfloat16 if gpu and torch.cuda.is_bf16_supported() and not full else torch.float32
    if wanted == "float16" and not gpu:
        raise AdapterError("dtype float16 needs a GPU; use bfloat16 or float32")
    return getattr(torch, wanted)


def _raise_problem(name: str) -> None:
    problem = model_problem(name)
    if problem:
        raise AdapterError(problem)


def _could_not_load(what: str, name: str, local: bool, error: Exception) -> str:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    advice = (
        "the folder may be incomplete"
        if local
        else (
            "there is no folder of that name, so it was looked for on the model hub; without a network, "
            "name the folder of a downloaded model"
        )
    )
    return f"{what} {name} could not be loaded: {said} ({advice})"
