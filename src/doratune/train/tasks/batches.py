"""From rows of tokens to batches: blocks of equal length, padded examples, packed examples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.nn.utils.rnn import pad_sequence

from doratune.train.tokens import IGNORED


def collate_blocks(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch of blocks: every token is predicted from those before it."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}


@dataclass(frozen=True)
class Padded:
    """A batch of examples, filled up at the end to the length of the longest."""

    pad: int

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return {
            "input_ids": _filled((row["input_ids"] for row in rows), self.pad),
            "labels": _filled((row["labels"] for row in rows), IGNORED),
            "attention_mask": _filled(([1] * len(row["input_ids"]) for row in rows), 0),
        }


@dataclass(frozen=True)
class Packed:
    """A batch of packed examples: positions start anew with each, which tells attention to keep them apart."""

    pad: int

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        ids = _filled((row["input_ids"] for row in rows), self.pad)
        labels = _filled((row["labels"] for row in rows), IGNORED)
        positions = []
        for row, own in zip(rows, labels, strict=True):
            sizes = [*row["seq_lengths"], len(own) - sum(row["seq_lengths"])]  # the last is what was filled up
            own[list(accumulate(row["seq_lengths"][:-1], initial=0))] = IGNORED  # or the one before would predict it
            positions.append([position for size in sizes for position in range(size)])
        return {"input_ids": ids, "labels": labels, "position_ids": torch.tensor(positions)}


def _filled(rows: Iterable[list[int]], value: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
