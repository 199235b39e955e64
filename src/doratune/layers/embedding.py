"""Embeddings: a magnitude per feature, the norm over the vocabulary (PEFT's convention).

W is ``[dim, vocab]``, A ``[r, vocab]``, B ``[dim, r]``. The norm reads the whole table in every training step, which
costs as much as r more tokens through a linear layer of the table's size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from doratune.layers.kind import Kind, Options
from doratune.layers.sharded import rows_of_part
from doratune.layers.weights import WeightRows, embedding_rows, is_dtensor, on_device
from doratune.ops.autocast import without_autocast
from doratune.ops.compose import scale_rows


def forward(
    base: nn.Module,
    x: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    magnitude: Tensor | None,
    scale: float,
    options: Options,
) -> Tensor:
    """``y = g (W[:, x] + s B A[:, x])`` for token ids x ``[...]``, times the base's own ``embed_scale`` if it has one.

    Dropout does not apply: there is nothing to drop from a token id.
    """
    u = base(x)
    if A is not None and B is not None:
        code = F.embedding(x, A.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)  # type: ignore[arg-type]
        with without_autocast(u.device):
            u = u + _embed_scale(base, u) * (code.to(u.dtype) @ (B * scale).to(u.dtype).T)
    if magnitude is None:
        return u
    with on_device(base):
        g = options.row_scale(embedding_rows(base), A, B, magnitude, scale)
    return scale_rows(u, g, keep="8-bit" if options.eight_bit else "input")


def _embed_scale(base: nn.Module, like: Tensor) -> Tensor | float:
    """The factor by which models such as Gemma multiply their embeddings inside the layer; the update gets it, too."""
    scale = getattr(base, "embed_scale", 1.0)
    return scale.to(like.dtype) if isinstance(scale, Tensor) else float(scale)


class Embedding(Kind):
    """``nn.Embedding``, and subclasses that only multiply by an ``embed_scale``."""

    name = "embedding"
    file_names = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")

    def serves(self, base: nn.Module) -> bool:
        return isinstance(base, nn.Embedding)

    def refusal(self, base: nn.Module) -> str | None:
        assert isinstance(base, nn.Embedding)
        if base.max_norm is not None:
            return "max_norm rewrites the table in every forward, so its norm is not the adapter's to keep"
        if base.sparse:
            return "sparse gradients do not reach a low-rank table; build it with sparse=False"
        if type(base).forward is not nn.Embedding.forward and not hasattr(base, "embed_scale"):
            return f"{type(base).__name__} has a forward of its own, which may not look up rows of its weight"
        return None

    def rows(self, base: nn.Module) -> WeightRows:
        return rows_of_part(base.weight, True) if is_dtensor(base.weight) else embedding_rows(base)

    forward = staticmethod(forward)

    def init(self, A: Tensor, B: Tensor, how: str) -> None:
        """A = 0 and B normal, as PEFT and loralib do: a row of A is looked up, not multiplied by an input."""
        nn.init.zeros_(A)
        nn.init.normal_(B)

    def merged_layer(self, base: nn.Module, merged: Tensor, bias: Tensor | None) -> nn.Module:
        return super().merged_layer(base, merged.T.contiguous(), bias)

    def probe(self, base: nn.Module, generator: torch.Generator) -> Tensor:
        vocabulary = self.rows(base).shape[1]
        ids = torch.randint(vocabulary, (64,), generator=generator, device="cpu")
        return ids.to(base.weight.device)  # type: ignore[arg-type]
