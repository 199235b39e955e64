"""What transformers' Trainer and TRL's SFTTrainer need in order to train adapters on plain models: one mixin.

    class MyTrainer(AdapterTrainerMixin, Trainer): ...

Checkpoints hold the adapter instead of the whole model, and end with a completion marker; resuming goes on from the
last complete one, with the learning rates, weight decay and intervals that are asked for now; magnitudes get their own
learning rate and no weight decay. On a model without adapters everything but the marker and what a resumed run goes on
with is the Trainer's own.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from doratune.checkpoint import decide, save_adapter
from doratune.distributed import is_spread, load_whole_optimizer_state, whole_optimizer_state
from doratune.errors import AdapterError
from doratune.extras import require
from doratune.model import active_adapter, parameter_groups
from doratune.train.checkpoints import (
    checkpoints,
    last_checkpoint,
    mark_complete,
    problem_of,
    restore_adapter,
    rotate,
    unmark,
)
from doratune.train.guards import (
    disable_dropout_with_trl,
    keeping_masters,
    refuse_bypassed_head,
    refuse_strangers,
    resumable,
    trainable_when_quantised,
)
from doratune.train.launch import keep_torchao_from_ddp, refuse_unserved, refuse_unsynchronised
from doratune.train.optimizer import keeping_rates, refuse_broken_weights, with_faster_b
from doratune.train.unused import check_without_adapter, warn_of_unused

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object


class AdapterTrainerMixin(Trainer):
    """Put it before the Trainer among the bases; attach the adapter before the trainer is made.

    Args:
        magnitude_learning_rate: of the magnitudes; None: that of the rest.
        magnitude_weight_decay: of the magnitudes; decay pulls them to 0, not to where they started.
        lora_plus_ratio: learning rate of B relative to the rest (LoRA+, arXiv 2402.12354).

    Everything else goes to the Trainer.

    Raises:
        AdapterError: for what adapters do not work with: ways of spreading a model, an adapted head under TRL's loss.
    """

    _may_train_whole = False
    """Whether a model without adapters is meant: otherwise a forgotten ``attach`` is likelier."""

    def __init__(
        self,
        model: Any = None,
        *args: Any,
        magnitude_learning_rate: float | None = None,
        magnitude_weight_decay: float = 0.0,
        lora_plus_ratio: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.magnitude_learning_rate = magnitude_learning_rate
        self.magnitude_weight_decay = magnitude_weight_decay
        self.lora_plus_ratio = lora_plus_ratio
        self._has_looked_for_unused = False
        with keeping_masters(model), resumable(model, [*args, *kwargs.values()]):
            super().__init__(trainable_when_quantised(model), *args, **kwargs)
        refuse_unserved(self)
        refuse_bypassed_head(self.model)
        disable_dropout_with_trl(self)

    def call_model_init(self, trial: Any = None) -> Any:
        """The Trainer's own; a quantised model that it makes is declared trainable."""
        return trainable_when_quantised(super().call_model_init(trial))

    # The optimiser

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's own optimiser, over doratune's parameter groups.

        Raises:
            AdapterError: if parameters outside the adapter are trained, which its checkpoints would not hold, or
                options are given that a model without adapters leaves without effect.
        """
        model = self.model
        if active_adapter(model) is None:
            if not self._may_train_whole:
                check_without_adapter(self)
            return super().create_optimizer(*args, **kwargs)
        refuse_strangers(model)
        if self.optimizer is not None:
            return super().create_optimizer(*args, **kwargs)
        chosen: Any = self.optimizer_cls_and_kwargs  # type: ignore[has-type]
        factory, options = chosen or self.get_optimizer_cls_and_kwargs(self.args, model)
        if not options.keys() & {"params", "model", "optimizer_dict"}:  # else the optimiser makes groups of its own
            groups = parameter_groups(
                model,
                lr=options.get("lr", self.args.learning_rate),
                magnitude_lr=self.magnitude_learning_rate,
                weight_decay=self.args.weight_decay,
                magnitude_weight_decay=self.magnitude_weight_decay,
            )
            groups = with_faster_b(model, groups, self.lora_plus_ratio)
            self.optimizer_cls_and_kwargs = (factory, {**options, "params": groups})
        try:
            return super().create_optimizer(*args, **kwargs)
        finally:
            self.optimizer_cls_and_kwargs = chosen

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own; ``True`` resumes from the last *whole* checkpoint.

        Raises:
            AdapterError: if there is none, or the one named was cut short or is damaged.
        """
        if resume_from_checkpoint is True:
            last = last_checkpoint(self.args.output_dir)
            if last is None:
                found = len(checkpoints(self.args.output_dir))
                raise AdapterError(
                    f"{self.args.output_dir} holds no whole checkpoint to resume from"
                    + (f" ({found} were passed over)" if found else "")
                )
            resume_from_checkpoint = str(last)
        elif resume_from_checkpoint and (problem := problem_of(resume_from_checkpoint)):
            raise AdapterError(
                f"{resume_from_checkpoint} {problem}; resume_from_checkpoint=True takes the last whole one"
            )
        if self.model_wrapped is self.model:
            # A measurement before training has the model marked as prepared, by which accelerate would take it for
            # wrapped: every process would train a model of its own.
            self.model.__dict__.pop("_is_accelerate_prepared", None)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self.state.compute_steps(self.args, self.state.max_steps)  # a resumed run's are those of its checkpoint
        keep_torchao_from_ddp(self.model)
        prepared = super()._prepare_for_training(*args, **kwargs)
        refuse_unsynchronised(self)
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, but a run that is resumed at its end is not trained for another step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own; after the first, adapters that the loss does not reach are named."""
        loss = super().training_step(*args, **kwargs)
        if not self._has_looked_for_unused:
            self._has_looked_for_unused = True
            warn_of_unused(self.model)
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's own; of a model that FSDP has sharded, the adapter is gathered and nothing else."""
        if active_adapter(self.model) is None or not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        name = active_adapter(self.model)
        if name is None:
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save or is_spread(self.model):  # where it lies in parts, all processes save together
            save_adapter(self.model, folder, name)
        if not self.args.should_save:
            return
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        refuse_broken_weights(self.model, self.state.global_step)
        name = active_adapter(self.model)
        if name is not None:
            decide(self.model, name)  # on every process, so that all decide alike
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            unmark(folder)
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # none is deleted before this one is whole
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # every process has written its part
        if self.args.should_save:
            mark_complete(folder)
            rotate(folder.parent, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if active_adapter(self.model) is None or not is_spread(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # Unsharded, so that any number of processes can resume from it, and without the base's weights.
        state = whole_optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:  # which has loaded both already
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with keeping_rates(self.optimizer, self.lr_scheduler):
            if active_adapter(self.model) is None or not is_spread(self.model):
                super()._load_optimizer_and_scheduler(checkpoint)
                return
            load = functools.partial(torch.load, map_location="cpu", weights_only=True)
            load_whole_optimizer_state(self.optimizer, load(Path(checkpoint) / "optimizer.pt"))
            self.lr_scheduler.load_state_dict(load(Path(checkpoint) / "scheduler.pt"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if active_adapter(self.model) is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            restore_adapter(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if active_adapter(self.model) is None:
            super()._load_best_model()
        elif self.state.best_model_checkpoint is not None:
            restore_adapter(self.model, self.state.best_model_checkpoint)


def __getattr__(name: str) -> Any:
    """``AdapterTrainer`` and ``AdapterSFTTrainer``: the mixin on transformers' Trainer and on TRL's."""
    bases = {"AdapterTrainer": ("transformers", "Trainer"), "AdapterSFTTrainer": ("trl", "SFTTrainer")}
    if name not in bases:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    library, base = bases[name]
    made = type(name, (AdapterTrainerMixin, getattr(require(library), base)), {"__module__": __name__})
    globals()[name] = made  # the same class on every look-up
    return made


if TYPE_CHECKING:
    AdapterTrainer: Any
    AdapterSFTTrainer: Any

__all__ = ["AdapterSFTTrainer", "AdapterTrainer", "AdapterTrainerMixin"]
