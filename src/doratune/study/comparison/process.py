"""One training run in a process of its own.

So its peak memory is its own, a run that is killed for memory takes no worker with it, and none inherits anything from
the one before. A server process that has imported the libraries makes each by forking, which takes a moment and not
seconds; with CUDA, which does not survive a fork, each is started anew.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

import torch

from doratune.train.config import TrainConfig
from doratune.train.quiet import quiet_libraries

if TYPE_CHECKING:
    from doratune.train.results import TrainResult


class KilledError(RuntimeError):
    """The process of a run ended without a result: killed, or out of memory."""


def train_apart(config: TrainConfig, worker: int = 0, workers: int = 1) -> TrainResult:
    """Train in a new process; nothing but the result is kept.

    Args:
        config: of the run.
        worker: which of the workers of this machine asks; it says which GPU is used.
        workers: how many share the machine's cores.

    Raises:
        AdapterError: as ``doratune.train.train`` does.
        KilledError: if the process was killed.
    """
    try:
        with ProcessPoolExecutor(1, mp_context=_context(), initializer=_watch_the_worker) as pool:
            return pool.submit(_train, config, worker, max(1, len(_cores()) // workers)).result()
    except BrokenProcessPool as error:
        raise KilledError("the training process was killed; out of memory?") from error
    finally:
        shutil.rmtree(config.output, ignore_errors=True)


def _context() -> Any:
    if torch.version.cuda is not None:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["doratune.study.comparison.preload"])
    return context


def _cores() -> Any:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def _train(config: TrainConfig, worker: int, threads: int) -> TrainResult:
    from doratune.train.run import train

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    visible = visible_gpu(os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count, worker)
    if visible is not None:  # one of several
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    quiet_libraries()
    return train(config)


def visible_gpu(visible: str | None, count: Callable[[], int], worker: int) -> str | None:
    """Which GPU a worker may see, as ``CUDA_VISIBLE_DEVICES``; None where there is no choice.

    Args:
        visible: its present value.
        count: how many GPUs CUDA sees. It is not asked about parts of GPUs (MIG): of those CUDA sees one at a time, and
            to look would settle which.
        worker: number of the worker.
    """
    names = [name.strip() for name in visible.split(",")] if visible is not None else []
    if not any(name.startswith("MIG-") for name in names):
        usable = count()
        names = names[:usable] if names else [str(i) for i in range(usable)]
    return names[worker % len(names)] if len(names) > 1 else None


def _watch_the_worker() -> None:
    threading.Thread(target=_end_with_the_worker, daemon=True).start()


def _end_with_the_worker() -> None:
    """A run whose worker was killed must not go on: another worker does it again."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
