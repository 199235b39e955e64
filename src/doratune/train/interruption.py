"""Ctrl-C and SIGTERM: finish the step, write a checkpoint, stop; outside the training loop, stop and say what is kept.

Of several processes each hears a signal at a time of its own, and the launcher ends them soon: they stop at once, with
the last good checkpoint to go on from.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from doratune.errors import Interrupted, Terminated
from doratune.train.config import TrainConfig
from doratune.train.failures import kept
from doratune.train.output import CHECKPOINTS
from doratune.train.processes import processes_asked

ENDS: dict[int, type[KeyboardInterrupt]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
"""What each signal that is heard raises."""


def _end(number: int, frame: Any) -> None:
    raise ENDS[number]


@contextlib.contextmanager
def told(config: TrainConfig, console: Console) -> Iterator[None]:
    """Within this context a run that is interrupted ends with what is kept and how to go on; SIGTERM is heard, too.

    Raises:
        Interrupted: instead of a KeyboardInterrupt.
    """
    # Several processes are ended by their launcher: one that waits for another in a collective would not hear it.
    hears = threading.current_thread() is threading.main_thread() and processes_asked() == 1
    before = signal.signal(signal.SIGTERM, _end) if hears else None
    try:
        yield
    except KeyboardInterrupt as stop:
        console.out(f"Interrupted. {kept(config, config.output / CHECKPOINTS)}", highlight=False)
        raise Interrupted(143 if isinstance(stop, Terminated) else 130) from None
    finally:
        if hears:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


class Interruption(TrainerCallback):
    """Ends training after the step in which a signal came; a second signal ends it at once."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.asked: type[KeyboardInterrupt] | None = None
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen; only the main thread can."""
        self.alone, self.process = args.world_size == 1, os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in ENDS}

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked or not self.alone:
            raise ENDS[number]
        self.asked = ENDS[number]
        if os.getpid() == self.process:  # workers that load data inherit this, and go on until the run has ended
            self.console.print("Stopping after this step, with a checkpoint; once more to stop at once.")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the Trainer for a checkpoint and an end."""
        if self.asked:
            control.should_save = control.should_training_stop = True

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
