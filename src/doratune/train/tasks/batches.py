"""From rows of tokens to batches: blocks of equal length, padded examples, packed examples."""

from __future__ import annotations

import torch

from doratune.train.tokens import IGNORED


def collate_blocks(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch of blocks: every token is predicted from those before it."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}


class Padded:
    """A batch of examples, filled up at the end to the length of the longest."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        filled = {
            "input_ids": [_fill(row["input_ids"], length, self.pad) for row in rows],
            "labels": [_fill(row["labels"], length, IGNORED) for row in rows],
            "attention_mask": [_fill([1] * len(row["input_ids"]), length, 0) for row in rows],
        }
        return {name: torch.tensor(values) for name, values in filled.items()}


class Packed:
    """A batch of packed examples: positions start anew with each, which tells attention to keep them apart."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        ids, labels, positions = [], [], []
        for row in rows:
            own = list(row["labels"])
            sizes = [*row["seq_lengths"], length - len(own)]
            start = 0
            for size in row["seq_lengths"]:
                own[start] = IGNORED  # or else the example before it would have to predict it
                start += size
            ids.append(_fill(row["input_ids"], length, self.pad))
            labels.append(_fill(own, length, IGNORED))
            positions.append([position for size in sizes for position in range(size)])
        found = {"input_ids": ids, "labels": labels, "position_ids": positions}
        return {name: torch.tensor(values) for name, values in found.items()}


def _fill(values: list[int], length: int, value: int) -> list[int]:
    return [*values, *[value] * (length - len(values))]
