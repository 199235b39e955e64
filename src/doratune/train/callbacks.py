"""What one sees of a run while it runs, and the record it leaves: progress bar and metrics.jsonl."""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich import progress
from rich.console import Console
from transformers import TrainerCallback

from doratune.distributed import is_first
from doratune.errors import AdapterError, DivergedError
from doratune.files import write_whole
from doratune.train.config import TrainConfig
from doratune.train.output import CHECKPOINTS, METRICS, RECIPE
from doratune.train.processes import is_first_asked
from doratune.train.recipe import save_recipe
from doratune.train.results import peak_memory, read_metrics
from doratune.train.resuming import past, since_best
from doratune.train.tasks.prepared import Prepared

_LEFT_OUT = (
    *("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"),
    "eval_model_preparation_time",
)
"""Of what the Trainer logs: reported in results.json in our own way, or of no use."""
EXPLODED = 10.0
"""A loss this far above that before training has left everything behind that can be learnt back."""


class MetricsFile(TrainerCallback):
    """One JSON object a line: ``step``, ``epoch`` and what was measured; lines after a resumed step are dropped."""

    def __init__(self, path: Path, unit: str, examples: int | None, writes: bool = True) -> None:
        self.path, self.unit, self.examples, self.writes = path, unit, examples, writes
        self.before: float | None = None
        self._keep(read_metrics(path))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the lines of the run that is resumed."""
        self._keep([record for record in read_metrics(self.path) if record["step"] <= state.global_step])

    def _keep(self, records: list[dict[str, Any]]) -> None:
        self.written = {(record["step"], "loss" in record) for record in records}
        if self.writes:
            write_whole(self.path, "".join(json.dumps(record) + "\n" for record in records))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Append a line.

        Raises:
            DivergedError: if the loss is not finite, or far above that before training: no later step can mend that.
        """
        values = {key: value for key, value in logs.items() if key not in _LEFT_OUT}
        if "train_loss" in values:
            return
        loss = values.get("loss", values.get("eval_loss", 0.0))
        if not math.isfinite(loss):
            raise DivergedError(self._hopeless(f"the loss is {loss}", state.global_step))
        if state.global_step == 0:
            self.before = loss
        elif self.before is not None and loss > self.before + EXPLODED:
            told = f"the loss has risen from {self.before:.2f} to {loss:.2f}"
            raise DivergedError(self._hopeless(told, state.global_step))
        key = (state.global_step, "loss" in values)
        if not self.writes or key in self.written:  # measured again, before a resumed run or at its end
            return
        self.written.add(key)
        record = {"step": state.global_step, self.unit: seen(self.unit, self.examples, args, state), **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    @staticmethod
    def _hopeless(what: str, step: int) -> str:
        if step == 0:
            return f"{what} before training: the model itself gives that on these data; try dtype float32"
        advice = "Try a lower learning_rate, a longer warmup, or dtype float32"
        return f"{what} at step {step}: training cannot recover. {advice}"


class Progress(TrainerCallback):
    """A progress bar with loss, speed, memory and time left; where there is no terminal, ten lines of text."""

    def __init__(self, console: Console, unit: str, examples: int | None, before: dict[str, float]) -> None:
        self.console, self.unit, self.examples = console, unit, examples
        self.bar = progress.Progress(
            progress.TextColumn("{task.fields[told]}"),  # one column: a narrow terminal cuts its end, and nothing else
            progress.BarColumn(bar_width=None),
            console=console,
            disable=not console.is_terminal,
        )
        self.loss = "-"
        self.held_out = _held_out(before)
        self.next_line = 0
        """Step from which on another line is printed, where there is no terminal."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar, at the step a resumed run goes on from."""
        self.start, self.first = time.monotonic(), state.global_step
        self.before = seen(self.unit, self.examples, args, state)
        self.measuring = 0.0
        begun = f"step {state.global_step}/{state.max_steps}"
        self.task = self.bar.add_task("train", total=state.max_steps, completed=state.global_step, told=begun)
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step, told=self._told(args, state))

    def speed(self, args: Any, state: Any) -> float:
        """Units a second; the time that held-out data took does not count."""
        elapsed = time.monotonic() - self.start - self.measuring
        return (seen(self.unit, self.examples, args, state) - self.before) / max(elapsed, 1e-9)

    def _told(self, args: Any, state: Any) -> str:
        speed = self.speed(args, state)
        memory = peak_memory(args.device) / 2**30
        per_step = (time.monotonic() - self.start) / max(1, state.global_step - self.first)
        left = datetime.timedelta(seconds=round(per_step * (state.max_steps - state.global_step)))
        parts = [f"step {state.global_step}/{state.max_steps}", f"{left} left", f"loss {self.loss}", *self.held_out]
        speed_told = f"{speed:,.{0 if speed >= 100 else 1}f} {self.unit}/s"
        return "  ".join([*parts, speed_told, f"{memory:.1f} GiB"])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        self.held_out = _held_out(logs) or self.held_out
        self.measuring += logs.get("eval_runtime", 0.0)
        if "loss" not in logs:
            return
        self.loss = f"{logs['loss']:.3f}"
        if not self.console.is_terminal and state.global_step >= self.next_line:
            self.next_line = state.global_step + max(1, state.max_steps // 10)
            self.console.print(self._told(args, state), soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the bar as it stands."""
        self.close()

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        self.bar.stop()


class NewEpoch(TrainerCallback):
    """Tells the data which epoch it is, so that images are changed anew; resumed runs go on with the same changes."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.data.epoch = int(state.epoch or 0)


def recording(config: TrainConfig, prepared: Prepared) -> list[TrainerCallback]:
    """What a run needs from its first measurement on: the record, and what changes images or stops behind the best."""
    callbacks: list[TrainerCallback] = [
        MetricsFile(config.output / METRICS, prepared.unit, prepared.examples, writes=is_first_asked())
    ]
    if config.augment:
        callbacks.append(NewEpoch(prepared.train))
    if config.patience is not None:
        callbacks.append(Patience(config.patience))
    return callbacks


class Patience(TrainerCallback):
    """Stops after so many measurements in a row without a lower loss.

    They are counted in the run's log, which checkpoints hold: a callback that counts by itself, as transformers' does,
    begins anew when the run is resumed.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Count; which step was the best is noted by the Trainer after this."""
        better = state.best_metric is None or metrics.get("eval_loss", math.inf) < state.best_metric
        if not better and since_best(state.log_history, state.best_global_step) >= self.patience:
            control.should_training_stop = True


class Resumed(TrainerCallback):
    """Keeps the options of a resumed run, once it is known that it goes on, and looks for the best step so far."""

    def __init__(self, config: TrainConfig, console: Console) -> None:
        self.config, self.console = config, console

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at what the checkpoint has restored.

        Raises:
            AdapterError: if the epochs asked for, which only now are a number of steps, are over.
        """
        if state.global_step > state.max_steps:
            raise AdapterError(f"nothing is left to train: {past(state.global_step, state.max_steps)}")
        best, output = state.best_global_step, self.config.output
        lost = bool(best) and not (output / CHECKPOINTS / f"checkpoint-{best}").is_dir()
        if lost and self.config.keep_best:
            gone = f"step {best}, the best so far, has no checkpoint any more: the best from here on is kept"
            self.console.out(gone, highlight=False)
        if lost or not self.config.keep_best:
            # The Trainer would report it as kept, or delete the last checkpoint in its favour.
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        if is_first():
            save_recipe(output / RECIPE, self.config)


class AfterBatch(TrainerCallback):
    """Does something after every batch of a measurement."""

    def __init__(self, what: Callable[[], object]) -> None:
        self.what = what

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.what()


def seen(unit: str, examples: int | None, args: Any, state: Any) -> int:
    """Tokens, or texts or images, that the run has trained on so far, of so many examples; None: of a stream."""
    if unit == "tokens":
        return int(state.num_input_tokens_seen)
    batch = args.train_batch_size * args.world_size
    if not examples:
        return int(state.global_step * batch * args.gradient_accumulation_steps)
    # The last batch of an epoch is what is left, and so is the last step: batches are counted, not steps.
    in_epoch = math.ceil(math.ceil(examples / args.train_batch_size) / args.world_size)  # that each process takes
    epochs, more = divmod(round((state.epoch or 0) * in_epoch), in_epoch)
    return epochs * examples + min(more * batch, examples)


def _held_out(values: dict[str, float]) -> list[str]:
    parts = []
    if "eval_loss" in values:
        parts.append(f"held-out {values['eval_loss']:.3f}")
    if "eval_accuracy" in values:
        parts.append(f"accuracy {values['eval_accuracy']:.1%}")
    return parts
