"""Ctrl-C and SIGTERM: finish the step, write a checkpoint, stop.

Of several processes each hears a signal at a time of its own, and the launcher ends them soon: they stop at once, with
the last good checkpoint to go on from.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

from doratune.extras import require

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import TrainerCallback
else:
    TrainerCallback = require("transformers").TrainerCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption(TrainerCallback):
    """Ends training after the step in which a signal came; a second signal ends it at once."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen; only the main thread can."""
        self.alone, self.process = args.world_size == 1, os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked or not self.alone:
            raise KeyboardInterrupt
        self.asked = True
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
