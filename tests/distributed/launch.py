"""Two ways to run ``doratune`` in two processes: as users do, and forked, without importing everything again."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from doratune.cli import main

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# hqq compiles functions while it is imported, two seconds of each process.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TORCHDYNAMO_DISABLE": "1"}


def forked(arguments: list[str], folder: Path) -> str:
    """What both print. If one fails the other is ended, as by torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torch.multiprocessing.start_processes(_run, (port, arguments, folder), nprocs=2, start_method="fork")
    return "".join((folder / f"stdout-{rank}").read_text() for rank in range(2))


def _run(rank: int, port: str, arguments: list[str], folder: Path) -> None:
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    AcceleratorState._reset_state(reset_partial_state=True)  # it may have seen that there is one process
    said = folder / f"stderr-{rank}"
    with (folder / f"stdout-{rank}").open("w") as sys.stdout, said.open("w") as sys.stderr:
        code = main(arguments)
    assert code == 0, said.read_text()[-3000:]
