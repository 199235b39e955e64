"""W of a base layer as numbers: one small function per way of storing it.

Whatever the storage, W is seen as ``[out, in]``, one row per magnitude: an ``nn.Linear`` as it is, transformers'
``Conv1D`` transposed, an embedding ``[vocab, dim]`` transposed to ``[dim, vocab]``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from doratune.ops.row_norm import Tiles, row_tiles


class WeightRows(NamedTuple):
    """W of one base layer, ``[out, in]``, to be walked in tiles of rows."""

    shape: tuple[int, int]
    stored: Tensor
    """The tensor the layer keeps; its identity, version, pointer and dtype tell whether W has changed."""
    tiles: Tiles
    transient: bool = False
    """True if tiles are made for the occasion (dequantised): nothing may keep them."""
    part: tuple[slice, slice] | None = None
    """Rows and columns of W that the tiles hold, where the rest lies on other processes."""
    matrices: int = 1
    """How many matrices of one shape lie under each other, each with an A of its own (``ops/stacked.py``)."""
    collect: Callable[[Tensor], Tensor] | None = None
    """Makes sums over all columns of the tiles' own, float32 ``[rows]``, by way of the other processes."""

    def collected(self, sums: Tensor) -> Tensor:
        """Sums over the tiles' rows, as they are for all of W."""
        return sums if self.collect is None else self.collect(sums)

    def own(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """What of A ``[r, in]`` and B ``[out, r]`` belongs to the tiles' columns and rows."""
        return (A, B) if self.part is None else (A[:, self.part[1]], B[self.part[0]])

    def small_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """The tiles, cut where a float32 copy of one would take much memory."""
        for outer, tile in self.tiles():
            for inner in row_tiles(tile.shape, tile.device):
                yield slice(outer.start + inner.start, outer.start + inner.stop), tile[inner]

    @classmethod
    def of_matrix(cls, matrix: Tensor, stored: Tensor) -> WeightRows:
        """A dense ``[out, in]`` matrix, one tile and no copy; a DTensor is gathered for the occasion."""

        def tiles() -> Iterable[tuple[slice, Tensor]]:
            dense = matrix.full_tensor() if is_dtensor(matrix) else matrix  # type: ignore[attr-defined]
            return ((slice(0, matrix.shape[0]), dense),)

        return cls((matrix.shape[0], matrix.shape[1]), stored, tiles)


def is_dtensor(t: object) -> bool:
    """True for a tensor whose parts lie on several processes; decided without importing torch.distributed.tensor."""
    return type(t).__name__ == "DTensor"


def is_transformers_conv1d(base: nn.Module) -> bool:
    """True for transformers' ``Conv1D`` (GPT-2), whose weight is ``[in, out]``; decided without importing it."""
    if type(base) is nn.Linear:
        return False
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(base).__mro__)


def linear_rows(base: nn.Module) -> WeightRows:
    """W of a dense linear layer."""
    weight: Tensor = base.weight  # type: ignore[assignment]
    transposed = is_transformers_conv1d(base)
    out, columns = weight.shape[::-1] if transposed else weight.shape

    def tiles() -> Iterable[tuple[slice, Tensor]]:
        W = weight.detach()
        return ((slice(0, out), W.T if transposed else W),)

    return WeightRows((out, columns), weight, tiles)


def rows_by_forward(base: nn.Module) -> WeightRows:
    """W of a linear layer of unknown make, found by running it, without the bias.

    The last resort: every norm costs r more tokens through the layer, |W|^2 and merging ``in`` more, once.
    """
    weight: Tensor = base.weight  # type: ignore[assignment]
    out, columns = int(base.out_features), int(base.in_features)  # type: ignore[arg-type]
    return WeightRows((out, columns), weight, _ByForward(base, weight, out, columns), transient=True)


class _ByForward:
    """Tiles of a W that only a forward knows: the whole for those who need its rows, products without them."""

    def __init__(self, base: nn.Module, weight: Tensor, out: int, columns: int) -> None:
        self.base = base
        self.weight = weight
        self.out, self.columns = out, columns

    def __call__(self) -> Iterable[tuple[slice, Tensor]]:
        W = self.weight.new_empty(self.out, self.columns)
        for columns, block in self._blocks():
            W[:, columns] = block.T
        return ((slice(0, self.out), W),)

    def squared(self) -> Tensor:
        """``|W|^2``, float32 ``[out]``."""
        total = torch.zeros(self.out, device=self.weight.device)
        for _, block in self._blocks():
            total += block.float().square().sum(0)
        return total

    def product(self, A: Tensor) -> Tensor:
        """``W A^T``, float32 ``[out, r]``, differentiable in A."""
        x = A.to(self.weight.dtype)
        return (self._run(x).float() - self._run(torch.zeros_like(x[:1])).float()).T

    def _run(self, x: Tensor) -> Tensor:
        """The layer's own forward with a bias of zeros: W beside a bias in 16 bits would lose most of its digits."""
        bias = self.base._parameters.get("bias")
        y: Tensor = self.base(x) if bias is None else functional_call(self.base, {"bias": torch.zeros_like(bias)}, (x,))
        return y

    def _blocks(self) -> Iterable[tuple[slice, Tensor]]:
        """Columns of W, ``[n, out]``: the forward of a few rows of the identity, so many that three fit into a tile."""
        with torch.no_grad():
            offset = self._run(self.weight.new_zeros(1, self.columns))
            for columns in row_tiles((self.columns, self.columns + 3 * self.out), self.weight.device):
                identity = self.weight.new_zeros(columns.stop - columns.start, self.columns)
                identity.diagonal(columns.start).fill_(1)
                yield columns, self._run(identity) - offset


def embedding_rows(base: nn.Module) -> WeightRows:
    """W of an embedding: ``[dim, vocab]``."""
    weight: Tensor = base.weight  # type: ignore[assignment]
    return WeightRows.of_matrix(weight.detach().T, weight)


def conv_rows(base: nn.Module) -> WeightRows:
    """W of a convolution: ``[out, in / groups * kernel]``."""
    weight: Tensor = base.weight  # type: ignore[assignment]
    return WeightRows.of_matrix(weight.detach().flatten(1), weight)


@torch.no_grad()
def remake_weight(base: nn.Module) -> None:
    """Have a weight that hooks make before each forward (``weight_norm``, ``prune``) follow what it is made from."""
    if "weight" in base.__dict__:
        for hook in base._forward_pre_hooks.values():
            if type(hook).__module__.startswith("torch.nn.utils."):
                hook(base, ())


def is_offloaded(base: nn.Module) -> bool:
    """Whether accelerate keeps the layer's weights elsewhere between forwards."""
    return bool(getattr(_keeper(base).__dict__.get("_hf_hook"), "offload", False))


def _keeper(base: nn.Module) -> nn.Module:
    """The module that keeps the parameters: of a part (``host.py``) that is its owner."""
    owner: tuple[nn.Module] = base.__dict__.get("_owner", (base,))
    return owner[0]


def on_device(base: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Make W available on its device where accelerate keeps it offloaded between calls."""
    keeper = _keeper(base)
    if not is_offloaded(base) or not any(p.is_meta for p in keeper.parameters(False)):
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(keeper)
