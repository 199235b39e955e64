"""Recording magnitude and direction while a Trainer trains; the values go wherever its log goes, TensorBoard too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from doratune.extras import require
from doratune.model import active_adapter
from doratune.study.analysis import Analysis, Point, Run
from doratune.study.decompose import Decomposition, adapter_change, moved, weights_of
from doratune.study.matrix import Matrix
from doratune.study.names import layer_of, short_kinds
from doratune.targets import adapted_layers, unwrap

if TYPE_CHECKING:
    from transformers import TrainerCallback
else:
    TrainerCallback = require("transformers").TrainerCallback


class ChangeRecorder(TrainerCallback):
    """Compare the weights with those at the start, every so many steps and at the end.

    ``trainer.add_callback(ChangeRecorder(trainer, every=100))`` before ``trainer.train()``. The log gets
    ``delta_m/KIND`` and ``delta_d/KIND``, means over layers, and ``delta_correlation``, over all that was recorded.

    Args:
        trainer: whose log is written to.
        every: steps between two looks; each reads every weight once.
        label: of the run in a report.

    An adapter of doratune is compared with its own base and needs no memory. Of a model that is trained whole, a copy
    of the weights is kept on the CPU, in float32.
    """

    def __init__(self, trainer: Any, every: int = 100, label: str = "training") -> None:
        self.trainer, self.every, self.label = trainer, every, label
        self.run: Run | None = None
        self._before: dict[str, Matrix] = {}

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy the weights, if the model is trained whole."""
        model = unwrap(self.trainer.model)
        name = active_adapter(model)
        if name is None:
            self._before = {path: Matrix.of(weight.dense()) for path, weight in weights_of(model).items()}
            method = "full"
        else:
            layer = next(layer for layer in adapted_layers(model).values() if name in layer.adapters)
            method = layer.adapters[name].config.method
        self.run = Run(self.label, method, [])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare, every so many steps and at the last one."""
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._record(state.global_step)

    def _record(self, step: int) -> None:
        run = self.run
        if run is None or f"step {step}" in run.checkpoints:
            return
        changes = self._changes()
        kinds = short_kinds(changes)
        index = len(run.checkpoints)
        run.checkpoints.append(f"step {step}")
        run.points += [Point(path, kinds[path], layer_of(path)[0], index, change) for path, change in changes.items()]
        values: dict[str, float] = {}
        for kind in dict.fromkeys(kinds.values()):
            own = [changes[path] for path in changes if kinds[path] == kind]
            values[f"delta_m/{kind}"] = sum(change.magnitude for change in own) / len(own)
            values[f"delta_d/{kind}"] = sum(change.direction for change in own) / len(own)
        correlation = run.correlation().value
        if correlation is not None:
            values["delta_correlation"] = correlation
        self.trainer.log(values)

    @torch.no_grad()
    def _changes(self) -> dict[str, Decomposition]:
        model = unwrap(self.trainer.model)
        if not self._before:
            return adapter_change(model)
        now = weights_of(model)
        return {path: moved(before, now[path]) for path, before in self._before.items()}

    def analysis(self) -> Analysis:
        """What was recorded, for ``analysis_page.page_of``."""
        return Analysis("the model before training", [self.run] if self.run else [])

    def write_report(self, folder: str | os.PathLike[str]) -> Path:
        """Write the page that ``doratune analyze`` would have written, and return it.

        Raises:
            AdapterError: if the folder holds something else, or matplotlib or jinja2 is not installed.
        """
        from doratune.study.analysis_page import page_of

        analysis = self.analysis()
        return page_of(analysis).write(Path(folder), analysis.as_json())
