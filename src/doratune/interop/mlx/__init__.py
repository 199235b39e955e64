"""Adapters of Apple's mlx-lm, to and from disk: what its trainer writes and its ``load_adapters`` reads.

A folder with ``adapter_config.json`` and ``adapters.safetensors``; keys ``<path>.lora_a`` ``[in, r]``,
``<path>.lora_b`` ``[r, out]`` and, for DoRA, ``<path>.m`` ``[out]``. One rank and one scale hold for all layers.
mlx-lm itself is not needed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from torch import Tensor, nn

from doratune.checkpoint import LISTED, attach_filled, config_of, layers_to_save, tensors_to_save
from doratune.config import AdapterConfig
from doratune.contents import PREFIX, Contents, read_contents
from doratune.distributed import writes
from doratune.errors import AdapterError
from doratune.files import MLX_WEIGHTS, write_adapter
from doratune.hub import adapter_folder
from doratune.interop.mlx.files import AdapterFiles
from doratune.interop.mlx.tree import PARTS, Tree
from doratune.interop.several import grouped
from doratune.peft_config import PeftOptions
from doratune.targets import as_targets, saved_modules, unwrap

__all__ = ["load_adapter", "save_adapter"]

NAME = re.compile(rf"(?P<path>.+)\.(?P<part>{'|'.join(PARTS)})", re.DOTALL)


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
    tree = Tree.of(root)
    config = next(iter(layers.values())).adapters[name].config
    reasons = [(path, reason) for path in layers if (reason := tree.misfit(path, config.method))]
    reasons += [(path, "its bias is trained, too") for path, layer in layers.items() if name in layer.adapter_bias]
    reasons += [(path, "it is trained whole") for path, saved in saved_modules(root).items() if name in saved.copies]
    if problems := grouped(reasons):
        raise AdapterError.of(f"adapter {name!r} cannot be mlx-lm's", problems, at_most=LISTED)
    tensors = tensors_to_save(root, name)
    if not writes(root):
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
    options = {
        "fine_tune_type": config.method,
        "lora_parameters": {"dropout": config.dropout, "keys": keys, "rank": rank, "scale": scale},
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
        folder: where its two files are, or a name on the model hub.
        name: what to call it here.
        trainable: True to go on training it.

    Returns:
        The same model.

    Raises:
        AdapterError: listing the problems by file, key and field, the first ten of many; the model is then unchanged.
    """
    root = unwrap(model)
    local = adapter_folder(folder)
    contents = _contents(root, local, AdapterFiles.read(local))
    attach_filled(root, contents, config_of(root, contents), name, trainable=trainable)
    return model


def _contents(root: nn.Module, folder: Path, file: AdapterFiles) -> Contents:
    """The file's tensors as those of PEFT's file of the same adapter, compared with the model.

    Raises:
        AdapterError: listing the problems, the first ten of many.
    """
    tree = Tree.of(root)
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
