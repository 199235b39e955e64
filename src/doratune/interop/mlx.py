"""Adapters of Apple's mlx-lm, to and from disk: what its trainer writes and its ``load_adapters`` reads.

A folder with ``adapter_config.json`` and ``adapters.safetensors``; keys ``<path>.lora_a`` ``[in, r]``,
``<path>.lora_b`` ``[r, out]`` and, for DoRA, ``<path>.m`` ``[out]``. One rank and one scale hold for all layers.
mlx-lm itself is not needed.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from doratune.checkpoint import LISTED, attach_filled, config_of, layers_to_save, tensors_to_save
from doratune.config import AdapterConfig, Method
from doratune.contents import KEY, PREFIX, Contents, Spelling, read_contents
from doratune.distributed import is_first, is_spread
from doratune.errors import AdapterError
from doratune.files import CONFIG, MLX_WEIGHTS, is_mlx, read_any_config, read_weights, write_adapter
from doratune.layers import Kind, kind_of
from doratune.peft_config import MOST_RANKS, PeftOptions
from doratune.targets import as_targets, plain_modules, saved_modules, unwrap

__all__ = ["load_adapter", "save_adapter"]

PARTS = ("lora_a", "lora_b", "m")
"""A, B and m, in the order of ``Kind.file_names``."""
NAME = re.compile(rf"(?P<path>.+)\.(?P<part>{'|'.join(PARTS)})", re.DOTALL)
HEAD = "lm_head"
SCALED = ("falcon_h1",)
"""Families whose weights mlx-lm multiplies by constants as it loads them; their adapters would have to follow."""

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 100


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], name: str = "default") -> None:
    """Write one adapter to a folder, as mlx-lm's ``--adapter-path`` takes it, whole or not at all.

    It is the same function there. Lower ranks are filled with zeros up to the highest, and scales that differ go into
    ``lora_b``. What only training with doratune knows (``norm_gradient``, ``norm_refresh``) is not written.

    Raises:
        AdapterError: if there is no such adapter, a value is not finite, the folder cannot be written, or listing what
            mlx-lm cannot have.
    """
    root = unwrap(model)
    layers = layers_to_save(root, name)
    tree = _Tree.of(root)
    method = next(iter(layers.values())).adapters[name].config.method
    problems = [f"{path}: {reason}" for path in layers if (reason := tree.misfit(path, method))]
    problems += [f"{path}: its bias is trained, too" for path, layer in layers.items() if name in layer.adapter_bias]
    problems += [f"{path}: it is trained whole" for path, saved in saved_modules(root).items() if name in saved.copies]
    if problems:
        raise AdapterError.of(f"adapter {name!r} cannot be mlx-lm's", problems, at_most=LISTED)
    tensors = tensors_to_save(root, name)
    if is_spread(root) and not is_first():
        return
    rank = max(1, *(layer.adapters[name].rank for layer in layers.values()))
    scale = max(layer.adapters[name].scale for layer in layers.values()) or 1.0  # 0 is that of magnitudes alone
    stored = {}
    for path, layer in layers.items():
        parts = [tensors.get(f"{PREFIX}{path}.{part}") for part in layer.kind.file_names]
        factor = (layer.adapters[name].scale or scale) / scale
        for part, tensor in zip(PARTS, _as_theirs(parts, rank, factor), strict=True):
            if tensor is not None:
                stored[f"{tree.theirs(path)}.{part}"] = tensor
    keys, count = tree.keys_of(layers)
    dropout = next(iter(layers.values())).adapters[name].config.dropout
    options = {
        "fine_tune_type": method,
        "lora_parameters": {"dropout": dropout, "keys": keys, "rank": rank, "scale": scale},
        "model": getattr(root, "name_or_path", None) or None,
        "num_layers": count,
    }
    write_adapter(Path(folder), stored, options, weights=MLX_WEIGHTS)


def _as_theirs(parts: list[Tensor | None], rank: int, factor: float) -> list[Tensor | None]:
    """A, B and m in mlx-lm's layout, at this rank, B times ``factor``."""
    A, B, m = parts
    assert A is not None
    assert B is not None
    a, b = A.new_zeros(A.shape[1], rank), B.new_zeros(rank, B.shape[0])
    a[:, : A.shape[0]] = A.T
    b[: B.shape[1]] = B.T * factor
    return [a, b, m]


def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], name: str = "default", *, trainable: bool = False
) -> nn.Module:
    """Attach the LoRA or DoRA adapter of a folder that mlx-lm's trainer wrote, or ``save_adapter``, and make it active.

    Args:
        model: the transformers model that it was made for; if it was trained on a quantised one, the same in full
            precision serves, and is not exactly the model it was trained on.
        folder: where its two files are.
        name: what to call it here.
        trainable: True to go on training it.

    Returns:
        The same model.

    Raises:
        AdapterError: listing the problems by file, key and field, the first ten of many; the model is then unchanged.
    """
    root = unwrap(model)
    contents = _contents(root, Path(folder), AdapterFiles.read(Path(folder)))
    attach_filled(root, contents, config_of(root, contents), name, trainable=trainable)
    return model


@dataclass(frozen=True)
class AdapterFiles:
    """What the two files of a folder say, not yet compared with a model."""

    base: str | None
    """The model that it was trained on."""
    method: Method
    rank: int
    scale: float
    dropout: float
    keys: frozenset[str] | None
    """Names of the adapted modules, inside a block or in the whole model; None: all linear layers of the blocks."""
    num_layers: int
    """Blocks that are adapted, counted from the last one; 0 or less: all."""
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> AdapterFiles:
        """Read a folder without a model.

        Raises:
            AdapterError: if it cannot be read at all, or naming every option that is missing or wrong.
        """
        raw = read_any_config(folder)
        if not is_mlx(raw):
            raise AdapterError(
                f"{folder / CONFIG} is not mlx-lm's: it has neither fine_tune_type nor lora_parameters; "
                "doratune.load_adapter reads PEFT's"
            )
        if raw.get("fine_tune_type") == "full":
            raise AdapterError(f"{folder}: fine_tune_type is 'full': it holds weights of the model, and no adapter")
        parameters = raw.get("lora_parameters")
        inner = {"dropout": 0.0, "keys": None, **parameters} if isinstance(parameters, dict) else {}
        outer = {"fine_tune_type": "lora", **raw, "lora_parameters": inner or parameters}
        problems = [
            f"{field}: expected {expected}, found {_repr.repr(values.get(field))}"
            for values, fields in ((outer, OUTER), (inner, INNER if inner else {}))
            for field, (fits, expected) in fields.items()
            if not fits(values.get(field))
        ]
        if problems:
            raise AdapterError.of(str(folder / CONFIG), problems)
        tensors, _ = read_weights(folder, MLX_WEIGHTS)
        base = raw.get("model")
        return cls(
            base if isinstance(base, str) and base else None,
            outer["fine_tune_type"],
            inner["rank"],
            float(inner["scale"]),
            float(inner["dropout"]),
            None if inner["keys"] is None else frozenset(inner["keys"]),
            outer["num_layers"],
            tensors,
        )


def _is_number(value: Any, least: float, below: float) -> bool:
    return type(value) in (int, float) and least <= value < below


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


OUTER: dict[str, tuple[Callable[[Any], bool], str]] = {
    "fine_tune_type": (lambda v: v in ("lora", "dora"), "'lora' or 'dora'"),
    "num_layers": (lambda v: type(v) is int, "a whole number"),
    "lora_parameters": (lambda v: isinstance(v, dict), "rank, scale, dropout and keys"),
}
"""What the options have to be; mlx-lm reads no others."""
INNER: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rank": (lambda v: type(v) is int and 0 < v <= MOST_RANKS, f"a whole number from 1 to {MOST_RANKS}"),
    "scale": (lambda v: _is_number(v, 1e-30, 1e30), "a finite number above 0"),
    "dropout": (lambda v: _is_number(v, 0, 1), "at least 0 and below 1"),
    "keys": (_are_names, "names of modules"),
}
"""What those in ``lora_parameters`` have to be."""


def _contents(root: nn.Module, folder: Path, file: AdapterFiles) -> Contents:
    """The file's tensors as those of PEFT's file of the same adapter, compared with the model.

    Raises:
        AdapterError: listing the problems, the first ten of many.
    """
    tree = _Tree.of(root)
    problems: list[str] = []
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in file.tensors.items():
        match = NAME.fullmatch(key)
        if match is None or (match["part"] == "m" and file.method == "lora"):
            problems.append(f"{key}: not a tensor of a {'DoRA' if file.method == 'dora' else 'LoRA'} adapter of mlx-lm")
        else:
            turned = tensor.permute(tuple(reversed(range(tensor.ndim)))).contiguous()
            layers.setdefault(tree.ours(match["path"]), {})[match["part"]] = turned
    reasons = {path: tree.problem(path, file) for path in layers}
    problems += [f"{path}: {reason}" for path, reason in reasons.items() if reason]
    fitting = [path for path, reason in reasons.items() if not reason]
    if fitting:
        targets = as_targets(fitting, tree.modules)
        alpha = file.scale * file.rank
        config = AdapterConfig(file.method, rank=file.rank, alpha=alpha, dropout=file.dropout, targets=targets)
        tensors = {
            f"{PREFIX}{path}.{tree.file_names(path)[PARTS.index(part)]}": tensor
            for path in fitting
            for part, tensor in layers[path].items()
        }
        contents = read_contents(root, PeftOptions(config, None, []), tensors, {}, tree.spelling())
        problems += contents.problems
    elif not problems:
        problems.append("it holds no adapted layer")
    if problems:
        raise AdapterError.of(f"{folder / MLX_WEIGHTS} does not fit", problems, at_most=LISTED)
    return contents


@dataclass(frozen=True)
class _Tree:
    """A transformers language model, and where mlx-lm has its modules."""

    modules: dict[str, nn.Module]
    inside: str
    """What the paths of the blocks and the embedding begin with here: ``model.``, or ``model.language_model.``."""
    outside: str
    """What all paths begin with there: nothing, or ``language_model.`` of a model that sees as well."""
    tied: bool
    """Whether embedding and head share a weight."""
    family: str

    @classmethod
    def of(cls, root: nn.Module) -> _Tree:
        modules = plain_modules(root)
        sees = "model.language_model.layers.0" in modules
        inside, outside = ("model.language_model.", "language_model.") if sees else ("model.", "")
        table, head = modules.get(f"{inside}embed_tokens"), modules.get(HEAD)
        tied = table is not None and head is not None and table.weight is head.weight
        return cls(modules, inside, outside, tied, getattr(getattr(root, "config", None), "model_type", ""))

    def theirs(self, path: str) -> str | None:
        """mlx-lm's path of a module; None where it has no such module, as far as one can tell."""
        if f"{self.inside}layers.0" not in self.modules:
            return None
        if path == HEAD:
            return self.outside + HEAD
        return f"{self.outside}model.{path.removeprefix(self.inside)}" if path.startswith(self.inside) else None

    def ours(self, path: str) -> str:
        """The opposite of ``theirs``; a path that is none of theirs stays what it is."""
        if path == self.outside + HEAD:
            return HEAD
        begin = f"{self.outside}model."
        return self.inside + path.removeprefix(begin) if path.startswith(begin) else path

    def misfit(self, path: str, method: str) -> str | None:
        """Why mlx-lm cannot have this layer adapted as doratune has it, or None."""
        kind = kind_of(self.modules[path])
        name = kind.name if kind is not None else type(self.modules[path]).__name__
        if self.theirs(path) is None:
            return f"mlx-lm has no such module: it knows {self.inside}layers, {self.inside}embed_tokens and {HEAD}"
        if self.family in SCALED:
            return f"mlx-lm multiplies the weights of a {self.family} by constants, which an adapter cannot follow"
        if name not in ("linear", "embedding"):
            return f"mlx-lm adapts linear layers and embeddings, and no {name}"
        if name == "embedding" and method == "dora":
            return "mlx-lm has a magnitude for each token of an embedding, doratune and PEFT one for each feature"
        if self.tied and path in (HEAD, f"{self.inside}embed_tokens"):
            return "embedding and head share a weight: mlx-lm adapts both or none, doratune each by itself"
        return None

    def file_names(self, path: str) -> tuple[str, str, str]:
        """How PEFT's files call A, B and m of a module."""
        kind = kind_of(self.modules[path]) if path in self.modules else None
        return (kind or Kind).file_names

    def problem(self, path: str, file: AdapterFiles) -> str | None:
        """Why a layer of a file cannot be read, or None; also where the model has no such layer, by this name."""
        if path not in self.modules:
            return None
        reason = self.misfit(path, file.method)
        if reason is None and not self._is_adapted(path, file):
            reason = f"the file has tensors for it, but by num_layers and keys in {CONFIG} it is not adapted"
        return reason

    def _is_adapted(self, path: str, file: AdapterFiles) -> bool:
        """mlx-lm's rule: names inside the last blocks, and whole names anywhere."""
        block = self._block(path)
        first = self._count - file.num_layers if file.num_layers > 0 else 0
        within = block is not None and block[0] >= first and (file.keys is None or block[1] in file.keys)
        return within or (file.keys is not None and self.theirs(path) in file.keys)

    def keys_of(self, paths: Iterable[str]) -> tuple[list[str], int]:
        """mlx-lm's ``keys`` and ``num_layers`` that adapt these modules and no other."""
        blocks = {path: block for path in paths if (block := self._block(path))}
        alone = [str(self.theirs(path)) for path in paths if path not in blocks]
        first = min((index for index, _ in blocks.values()), default=0)
        names = sorted({name for _, name in blocks.values()})
        reached = {f"{self.inside}layers.{i}.{name}" for i in range(first, self._count) for name in names}
        if blocks.keys() == reached & self.modules.keys():
            return names + alone, self._count - first
        return [str(self.theirs(path)) for path in blocks] + alone, self._count

    @property
    def _count(self) -> int:
        """Blocks of the model."""
        return sum(1 for path in self.modules if re.fullmatch(re.escape(self.inside) + r"layers\.\d+", path))

    def _block(self, path: str) -> tuple[int, str] | None:
        """The number of the block that a module lies in, and its name there."""
        match = re.fullmatch(re.escape(self.inside) + r"layers\.(\d+)\.(.+)", path)
        return (int(match[1]), match[2]) if match else None

    def spelling(self) -> Spelling:
        """How the file calls what PEFT's keys name; everything lies there the other way round."""

        def key(peft: str) -> str:
            match = KEY.fullmatch(peft.removeprefix(PREFIX))
            assert match is not None
            part = next(p for sign, p in zip(("_A", "_B", "_m"), PARTS, strict=True) if sign in match["part"])
            return f"{self.theirs(match['path']) or match['path']}.{part}"

        return Spelling(key, lambda shape: tuple(shape)[::-1])
