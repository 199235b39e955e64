"""Errors during training, explained: what to change, and what is kept."""

from __future__ import annotations

import contextlib
import errno
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from doratune.distributed import processes
from doratune.errors import AdapterError, DivergedError, first_line
from doratune.train.checkpoints import find_last
from doratune.train.config import TrainConfig
from doratune.train.output import RECIPE
from doratune.train.processes import processes_asked

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_ROOM_SIGNS = ("no space left", "os error 28", "disk quota", "file too large", "file write failed", "unexpected pos")
"""In messages of libraries that hide the operating system's error."""
PEER_SIGNS = ("connection closed by peer", "connection reset", "gloo", "nccl")
MEMORY_SIGNS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


@contextlib.contextmanager
def explained(config: TrainConfig, checkpoints: Path) -> Iterator[None]:
    """Turn errors of a training loop into one message: the cause, what to change, and what is kept.

    Raises:
        AdapterError: instead of an error that is understood; others pass as they are.
    """
    try:
        yield
    except Exception as error:
        cause = str(error) if isinstance(error, AdapterError) else _cause(error, config)
        if cause is None:
            raise
        kind = DivergedError if isinstance(error, DivergedError) else AdapterError
        raise kind(f"{cause}\n{kept(config, checkpoints)}") from error


def kept(config: TrainConfig, checkpoints: Path) -> str:
    """Which checkpoint is there to go on from, and how."""
    last, _ = find_last(checkpoints)
    if last is None:
        return "No checkpoint had been written yet."
    return f"{last} is the last good checkpoint; to go on from it: {resume_command(config)}"


def resume_command(config: TrainConfig) -> str:
    """How to go on with a run."""
    asked = processes_asked()
    program = "doratune" if asked == 1 else f"torchrun --nproc-per-node {asked} -m doratune"
    return f"{program} train --recipe {shlex.quote(str(config.output / RECIPE))} --resume"


def tells_of_no_room(error: Exception) -> bool:
    """Whether a disk or a quota is full."""
    number = error.errno if isinstance(error, OSError) else None
    return number in NO_ROOM or any(sign in str(error).lower() for sign in NO_ROOM_SIGNS)


def _cause(error: Exception, config: TrainConfig) -> str | None:
    said = str(error).lower()
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in said for sign in MEMORY_SIGNS):
        advice = [f"a smaller batch_size (now {config.batch_size}) with more gradient_accumulation"]
        if config.task == "image-classification":
            advice.append("a smaller image_size")
        else:
            advice.append(f"a smaller max_length (now {config.max_length})")
        if not config.gradient_checkpointing:
            advice.append("--gradient-checkpointing")
        if config.is_adapter and not config.quantize:
            advice.append("--quantize nf4")
        return f"out of memory: {first_line(error)}. Try {', '.join(advice)}"
    if tells_of_no_room(error):
        free = shutil.disk_usage(config.output).free / 1e6
        return (
            f"writing to {config.output} failed: {first_line(error)} ({free:,.0f} MB are free). Make room, or name an "
            "output on another disk; a smaller keep needs less"
        )
    if processes() > 1 and any(sign in said for sign in PEER_SIGNS):
        return f"another process of this run has ended ({first_line(error)}); its own message is above or below"
    if isinstance(error, OSError):
        return f"reading or writing failed while training: {first_line(error)}. Are data and output still there?"
    return None
