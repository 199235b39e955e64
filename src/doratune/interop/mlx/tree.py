"""Where mlx-lm has the modules of a transformers language model, and which of them it can adapt."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from doratune.contents import KEY, PREFIX, Spelling
from doratune.files import CONFIG
from doratune.interop.mlx.files import AdapterFiles
from doratune.layers import Kind, kind_of
from doratune.targets import plain_modules

PARTS = ("lora_a", "lora_b", "m")
"""A, B and m, in the order of ``Kind.file_names``."""
HEAD = "lm_head"
SCALED = ("falcon_h1",)
"""Families whose weights mlx-lm multiplies by constants as it loads them; their adapters would have to follow."""


@dataclass(frozen=True)
class Tree:
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
    def of(cls, root: nn.Module) -> Tree:
        """Look at a model."""
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
