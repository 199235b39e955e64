"""Weights in safetensors files, read one at a time, without the model that they belong to.

A file says nothing of a layer's type. Where it matters, names decide: embeddings are read as adapters see them
(``[dim, vocab]``), the weights of transformers' ``Conv1D`` transposed, packed projections of ``nn.MultiheadAttention``
apart.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from doratune.layers.attention import NAMES as PROJECTIONS
from doratune.study.matrix import Matrix
from doratune.weight_files import header, read_tensor, weight_files

FLOATS = ("F64", "F32", "F16", "BF16")
EMBEDDING = re.compile(r"(.*\.)?(\w*embed(ding|dings|s)?(_tokens|_positions)?|wte|wpe|shared)")
"""Paths of ``nn.Embedding`` as models name them."""
WITH_CONV1D = ("gpt2", "imagegpt", "decision_transformer", "openai-gpt", "clvp")
"""Types of models with transformers' ``Conv1D``, which stores ``[in, out]``."""
CONV1D = re.compile(r"(.*\.)?(c_attn|q_attn|c_proj|c_fc)")
"""Paths of such layers."""
PACKED = "in_proj_weight"
HEADS = ("lm_head", "embed_out")
WRITES = re.compile(r"For\w*LM|LMHead|ForConditionalGeneration|ForPreTraining|MTModel|DoubleHeads|Decoder|2Text")
"""In names of model classes with an output head: configs of encoders are tied, too, and have none."""


class Weights(Protocol):
    """Weights of one model or checkpoint."""

    shapes: dict[str, tuple[int, int]]
    """``[out, in]`` of each weight that can be looked at, by path."""
    left_out: dict[str, str]
    """Every other tensor, by name, with the reason."""

    def open(self, path: str, base: Matrix) -> contextlib.AbstractContextManager[Matrix]:
        """One weight, mapped into memory as long as the context lasts; ``base`` is the one before training."""


@dataclass(frozen=True)
class _Place:
    file: Path
    key: str
    transposed: bool = False
    part: slice | None = None


class StoredWeights:
    """The weights of a model's folder, or of one safetensors file.

    Raises:
        AdapterError: if there is no safetensors file, one is missing or broken, or there is a pickle instead.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        self.shapes: dict[str, tuple[int, int]] = {}
        self.left_out: dict[str, str] = {}
        self._places: dict[str, _Place] = {}
        config = _model_config(source)
        self._transposed = [EMBEDDING, CONV1D] if config.get("model_type") in WITH_CONV1D else [EMBEDDING]
        tied = _is_tied(config)
        headers = {file: header(file) for file in weight_files(source)}
        quantised = {key.rpartition(".")[0] for keys in headers.values() for key in keys if _quantised(keys, key)}
        for file, keys in headers.items():
            for key, (dtype, shape) in keys.items():
                reason = _unfit(key, dtype, shape, quantised)
                if tied and key.removesuffix(".weight").split(".")[-1] in HEADS:
                    reason = "tied to the input embedding by config.json: looked at once, there"
                if reason:
                    self.left_out[key] = reason
                else:
                    self._place(file, key, shape)
        if tied and _has_head(config) and not any(reason.startswith("tied") for reason in self.left_out.values()):
            self.left_out["(output head)"] = "tied to the input embedding by config.json: looked at once, there"

    def _place(self, file: Path, key: str, shape: list[int]) -> None:
        path, _, name = key.rpartition(".")
        if name == PACKED:
            size = shape[0] // 3
            for index, part in enumerate(PROJECTIONS[:3]):
                self._places[f"{path}.{part}"] = _Place(file, key, part=slice(index * size, (index + 1) * size))
                self.shapes[f"{path}.{part}"] = (size, shape[1])
            return
        transposed = len(shape) == 2 and any(names.fullmatch(path) for names in self._transposed)
        self._places[path] = _Place(file, key, transposed)
        rows, columns = flat(shape)
        self.shapes[path] = (columns, rows) if transposed else (rows, columns)

    def is_transposed(self, path: str) -> bool:
        """Whether the file holds the weight as ``[in, out]``."""
        return self._places[path].transposed

    @contextlib.contextmanager
    def open(self, path: str, base: Matrix | None = None) -> Iterator[Matrix]:
        """One weight. The file is mapped for it alone: pages that were read for another one are given back."""
        place = self._places[path]
        tensor = read_tensor(place.file, place.key)
        if place.part is not None:
            tensor = tensor[place.part]
        yield Matrix.of(tensor.T if place.transposed else tensor.flatten(1))


def flat(shape: list[int]) -> tuple[int, int]:
    """The shape of a weight as a matrix: its first dimension, and all others."""
    return shape[0], math.prod(shape[1:])


def _unfit(key: str, dtype: str, shape: list[int], quantised: set[str]) -> str | None:
    """Why a tensor is not looked at, or None."""
    path, _, name = key.rpartition(".")
    if path in quantised or any(path.startswith(f"{owner}.") for owner in quantised):
        return f"quantised ({dtype}): give a checkpoint in 16 or 32 bits"
    if dtype not in FLOATS:
        return f"holds {dtype}, not floating-point numbers"
    if len(shape) < 2:
        return "a vector: it has no rows that could turn"
    if 0 in shape:
        return "empty"
    if name not in ("weight", PACKED):
        return f"a bare {'x'.join(map(str, shape))} parameter, which no kind of layer serves"
    return None


def _quantised(keys: dict[str, tuple[str, list[int]]], key: str) -> bool:
    """Whether a tensor is a layer's weight in few bits, as bitsandbytes, GPTQ, AWQ, HQQ and float8 store it."""
    dtype = keys[key][0]
    name = key.rpartition(".")[2]
    return dtype not in FLOATS and name in ("weight", "qweight", "weight_packed", "W_q")


def _model_config(source: Path) -> dict[str, Any]:
    """``config.json``; empty where there is none that can be read."""
    try:
        config = json.loads(((source if source.is_dir() else source.parent) / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _has_head(config: dict[str, Any]) -> bool:
    """Whether the model is one that writes, as far as its config tells."""
    names = config.get("architectures")
    return not names or any(WRITES.search(str(name)) for name in names)


def _is_tied(config: dict[str, Any]) -> bool:
    inner = config.get("text_config")
    return bool(config.get("tie_word_embeddings") or (isinstance(inner, dict) and inner.get("tie_word_embeddings")))
