"""What one sees of a run while it runs, and the record it leaves: progress bar and metrics.jsonl."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doratune.errors import AdapterError
from doratune.train.extras import require
from doratune.train.results import read_metrics

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import TrainerCallback
else:
    TrainerCallback = require("transformers").TrainerCallback

_UNITS = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
"""Of the Trainer's last message: reported in results.json in our own way."""


class MetricsFile(TrainerCallback):
    """One JSON object a line: ``step``, ``epoch`` and what was measured; lines after a resumed step are dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the lines of the run that is resumed, and of the measurement before it once."""
        records = [record for record in read_metrics(self.path) if record["step"] <= state.global_step]
        unique = {(record["step"], "loss" in record): record for record in records}
        kept = [unique[key] for key in sorted(unique)]
        self.path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Append a line.

        Raises:
            AdapterError: if the loss is not finite: no later step can mend that.
        """
        values = {key: value for key, value in (logs or {}).items() if key not in _UNITS}
        if not state.is_world_process_zero or "train_loss" in values:
            return
        loss = values.get("loss", 0.0)
        if not math.isfinite(loss):
            raise AdapterError(
                f"the loss is {loss} at step {state.global_step}: training cannot recover. Try a lower learning_rate, "
                "a longer warmup, or dtype float32; checkpoints saved before are kept"
            )
        record = {"step": state.global_step, "tokens": state.num_input_tokens_seen, **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class Progress(TrainerCallback):
    """A progress bar with loss, tokens per second and time left; where there is no terminal, ten lines of text."""

    def __init__(self, console: Console, held_out: float | None = None) -> None:
        from rich import progress

        self.console = console
        self.bar = progress.Progress(
            progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            progress.BarColumn(),
            progress.TextColumn("loss {task.fields[loss]}"),
            progress.TextColumn("held-out {task.fields[held_out]}"),
            progress.TextColumn("{task.fields[speed]} tokens/s"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.fields: dict[str, Any] = {
            "loss": "-",
            "held_out": "-" if held_out is None else f"{held_out:.3f}",
            "speed": "-",
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar, at the step a resumed run goes on from."""
        self.start, self.tokens, self.first = time.monotonic(), state.num_input_tokens_seen, state.global_step
        self.task = self.bar.add_task("train", total=state.max_steps, completed=state.global_step, **self.fields)
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance."""
        elapsed = time.monotonic() - self.start
        self.fields["speed"] = f"{(state.num_input_tokens_seen - self.tokens) / max(elapsed, 1e-9):,.0f}"
        self.bar.update(self.task, completed=state.global_step, **self.fields)
        tenth = max(1, state.max_steps // 10)
        if not self.console.is_terminal and (state.global_step % tenth == 0 or state.global_step == state.max_steps):
            left = elapsed / max(1, state.global_step - self.first) * (state.max_steps - state.global_step)
            self.console.print(
                f"step {state.global_step}/{state.max_steps}  loss {self.fields['loss']}  "
                f"{self.fields['speed']} tokens/s  {left:.0f} s left"
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Take over the newest values."""
        for key, name in (("loss", "loss"), ("eval_loss", "held_out")):
            if key in (logs or {}):
                self.fields[name] = f"{(logs or {})[key]:.3f}"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the bar as it stands."""
        self.close()

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        self.bar.stop()
