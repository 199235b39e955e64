"""Rows of W that are zero: written into files so that nobody divides 0 by 0, and read back as what they were.

In memory such a row trains as a plain LoRA row, which an m of 0 marks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from doratune.layers import AdaptedLayer
from doratune.layers.sharded import assign
from doratune.ops.stacked import count_of

SAME_NORM = 1e-4
"""A zero row of W whose stored m is its norm, up to this relative difference, is trained as plain LoRA."""
PLACEHOLDER_B = 1e-3
PLACEHOLDER_A = 1e-12
"""Written in place of zeros where PEFT would divide 0 by 0; read back as 0."""


@torch.no_grad()
def parts_for_file(layer: AdaptedLayer, name: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """A, B and m for a file. Rows of W that are zero get an m, or a row of B, that others can divide by."""
    A, B, m = layer.whole_parts(name)
    if A is None or B is None:
        assert m is not None
        W = layer.weight_rows()
        out, columns = W.shape
        A = torch.full((W.matrices, columns), columns**-0.5, device=m.device)
        B = torch.zeros(out, 1, device=m.device)
    if m is None:
        return A, B, None
    zero = layer.base_squared() == 0
    if zero.any():
        n = layer.squared_norm(name).sqrt()
        m = torch.where(zero & (m == 0), n, m)
        dead = zero & (n == 0)
        if dead.any() and count_of(A, B) == 1:  # only doratune reads those of matrices under each other
            # m = 0 makes the row 0 whatever B is; an update that is not 0 keeps others from dividing 0 by 0.
            m = torch.where(dead, 0.0, m)
            A = A if A.any() else torch.full_like(A, PLACEHOLDER_A)
            B = B.clone()
            B[_silent(dead, A, B)] = _stand_in_row(A)
    return A, B, m


def _silent(rows: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Indices, among the rows marked, of those where B A is 0."""
    indices = rows.nonzero()[:, 0]
    return indices[(B[indices] @ A).square().sum(1) == 0]


def _stand_in_row(A: Tensor) -> Tensor:
    row = torch.zeros(A.shape[0], device=A.device)
    row[A.square().sum(1).argmax()] = PLACEHOLDER_B
    return row


@torch.no_grad()
def recognise_plain_rows(layer: AdaptedLayer, name: str) -> None:
    """Zero rows of W whose m is their norm train as plain LoRA rows again; any other m is honoured."""
    zero = layer.base_squared() == 0
    if not zero.any():
        return
    A, B, m = layer.whole_parts(name)
    assert m is not None
    without_m = zero & (m == 0)
    if A is not None and B is not None and count_of(A, B) == 1 and without_m.any():
        stands_in = (B == _stand_in_row(A)).all(1)  # noqa: SIM300
        if (A == torch.tensor(PLACEHOLDER_A, device=A.device)).all():  # noqa: SIM300
            A.zero_()
        # These rows are 0 whatever B is; read as plain LoRA, with m = 0, their B would be heard.
        kept = torch.zeros_like(zero)
        kept[_silent(without_m, A, B)] = True
        B[without_m & (stands_in | ~kept)] = 0
        assign(layer.lora_A[name], A)
        assign(layer.lora_B[name], B)
    n = layer.squared_norm(name).sqrt()
    m[zero & ((m - n).abs() <= SAME_NORM * n)] = 0
    assign(layer.magnitude[name], m)
