"""doratune.json in every checkpoint, so that it can be used and trained further as the run's result can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from doratune.train.config import TrainConfig
from doratune.train.information import Information
from doratune.train.tasks.prepared import Prepared

Trainer: Any = object  # transformers' is the next base of the classes made with this one


class Noted(Trainer):
    """Put it before the Trainer among the bases."""

    information: Information
    _may_train_whole = True  # by the method full

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.information.save(Path(output_dir or self.args.output_dir))


def information(config: TrainConfig, prepared: Prepared) -> Information:
    """What a run notes about its result."""
    generates = config.task == "text-generation"
    return Information(
        task=config.task,
        base=config.model,
        method=config.method,
        labels=prepared.labels,
        columns=prepared.columns,
        prompt_template=config.prompt_template,
        as_chat=config.as_chat if generates else None,
        loss_on=config.loss_on if generates else None,
        max_length=None if prepared.unit == "images" else config.max_length,
        packing=config.packing if generates else None,
        image_size=prepared.image_size,
        forward=prepared.forward,
        dtype=config.dtype,
        quantize=config.quantize,
        double_quant=config.double_quant,
    )
