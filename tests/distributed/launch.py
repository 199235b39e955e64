"""Two processes: as users start them, and forked, without importing everything again."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from doratune.cli import main

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# hqq compiles functions while it is imported, two seconds of each process.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TORCHDYNAMO_DISABLE": "1"}


def forked(arguments: list[str], folder: Path) -> str:
    """What both print of a command of ``doratune``."""
    return run_forked(_command, folder, arguments)


def run_forked(function: Callable[..., None], folder: Path, *arguments: Any) -> str:
    """What both print of a function. If one fails the other is ended, as by torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torch.multiprocessing.start_processes(_run, (port, function, folder, arguments), nprocs=2, start_method="fork")
    return "".join((folder / f"stdout-{rank}").read_text() for rank in range(2))


def _run(rank: int, port: str, function: Callable[..., None], folder: Path, arguments: tuple[Any, ...]) -> None:
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    AcceleratorState._reset_state(reset_partial_state=True)  # it may have seen that there is one process
    with (folder / f"stdout-{rank}").open("w") as sys.stdout, (folder / f"stderr-{rank}").open("w") as sys.stderr:
        function(*arguments)


def _command(arguments: list[str]) -> None:
    code = main(arguments)
    assert code == 0, Path(sys.stderr.name).read_text()[-3000:]
