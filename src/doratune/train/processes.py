"""The processes that torchrun or accelerate started for a run, as their environment tells before they have met."""

from __future__ import annotations

import os


def processes_asked() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_asked() -> bool:
    """Whether this is the one that writes and speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def local_rank_asked() -> int:
    """The number of this one among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))
