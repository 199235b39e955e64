"""What a task hands to the run: data ready for the Trainer, and how to talk about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Unit = Literal["tokens", "texts", "images"]


@dataclass
class Prepared:
    """Data of a run, checked and ready."""

    train: Any
    """None: there is nothing to train on, only to measure."""
    held_out: Any
    collate: Callable[[list[Any]], dict[str, Any]]
    processor: Any
    """Tokenizer or image processor."""
    unit: Unit
    """What speed is counted in."""
    example: str
    """What a row of the data is called: "blocks of 128 tokens", "images"."""
    labels: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    image_size: tuple[int, int] | None = None
    forward: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the model's forward besides its inputs."""
    test: Any = None
    """What is measured once, after training; None: nothing."""

    @property
    def examples(self) -> int | None:
        """Rows to train on; None for a stream, and where there are none."""
        return len(self.train) if hasattr(self.train, "__len__") else None
