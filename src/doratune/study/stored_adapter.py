"""An adapter's file as changed weights of its base, read one layer at a time, without building the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from doratune.checkpoint import LISTED
from doratune.contents import KEY, PREFIX
from doratune.errors import AdapterError
from doratune.files import WEIGHTS
from doratune.own_options import with_own_options
from doratune.study.adapter_file import inspect_adapter
from doratune.study.matrix import Matrix, adapted
from doratune.study.stored import flat
from doratune.weight_files import header, read_metadata, read_tensor

_A = ("lora_A.weight", "lora_embedding_A")
_B = ("lora_B.weight", "lora_embedding_B")
_M = "lora_magnitude_vector"
COPY = "a copy of the base's weight, which PEFT writes beside an adapted embedding: it is compared with its A and B"


class StoredAdapter:
    """What an adapter's folder makes of each weight that it adapts, or holds whole.

    Raises:
        AdapterError: if it cannot be read, or listing what is broken in it, as ``doratune inspect`` does.
    """

    def __init__(self, folder: Path) -> None:
        report = inspect_adapter(folder)
        if report.broken:
            raise AdapterError.of(f"{folder / WEIGHTS} cannot be used", report.broken, at_most=LISTED)
        self.file = folder / WEIGHTS
        self.config = with_own_options(report.config, read_metadata(self.file))
        self.method = self.config.method
        self.shapes: dict[str, tuple[int, int]] = {}
        self.left_out: dict[str, str] = {}
        self._parts: dict[str, dict[str, str]] = {}
        self._whole: dict[str, str] = {}
        self._turned: set[str] = set()
        self._sort()

    @property
    def adapted(self) -> set[str]:
        """Paths of the layers with A and B; others in ``shapes`` are held whole."""
        return set(self._parts)

    def _sort(self) -> None:
        sizes = header(self.file)
        for key, (_, shape) in sizes.items():
            inner = key.removeprefix(PREFIX)
            match = KEY.fullmatch(inner)
            if match and match["part"].startswith("lora"):
                self._parts.setdefault(match["path"], {})[match["part"]] = key
            elif inner.endswith("base_layer.weight"):
                self.left_out[inner] = COPY
            elif inner.endswith(".weight") and len(shape) > 1:
                path = inner.removesuffix(".weight")
                self._whole[path] = key
                self.shapes[path] = flat(shape)
            else:
                self.left_out[inner] = "trained whole, but a vector: it has no rows that could turn"
        for path, parts in self._parts.items():
            A, B = sizes[_one(parts, _A)][1], sizes[_one(parts, _B)][1]
            self.shapes[path] = (B[0], flat(A)[1])

    def turn(self, paths: Iterable[str]) -> None:
        """Read these as ``[in, out]`` if they are held whole, as the base's file holds them."""
        for path in set(paths) & self._whole.keys() - self._turned:
            self._turned.add(path)
            self.shapes[path] = self.shapes[path][::-1]

    @contextlib.contextmanager
    def open(self, path: str, base: Matrix) -> Iterator[Matrix]:
        """``W'`` of one layer."""
        if path in self._whole:
            whole = read_tensor(self.file, self._whole[path]).flatten(1)
            yield Matrix.of(whole.T if path in self._turned else whole)
            return
        parts = self._parts[path]
        A, B = (read_tensor(self.file, _one(parts, names)).flatten(1) for names in (_A, _B))
        m = read_tensor(self.file, parts[_M]).flatten() if _M in parts else None
        if self.config.rank_of(path) == 0:  # the file holds stand-ins
            yield adapted(base, None, None, m, 0.0)
        else:
            yield adapted(base, A, B, m, self.config.scale_of(path))


def _one(parts: dict[str, str], names: tuple[str, ...]) -> str:
    return next(parts[name] for name in names if name in parts)
