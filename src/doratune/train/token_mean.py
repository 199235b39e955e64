"""Held-out loss of language models as a mean over tokens."""

from __future__ import annotations

from typing import Any

import torch

from doratune.train.tokens import IGNORED

Trainer: Any = object  # transformers' is the next base of the classes made with this one


class TokenMean(Trainer):
    """Put it before a Trainer of causal language models, which is to measure losses only.

    The Trainer weighs the mean of each batch by its examples, so that the loss depends on which examples share a batch.
    """

    tokens = 0
    """On which the last loss was taken."""

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Note the sum of the losses of a batch, and of how many tokens."""
        inputs = self._prepare_inputs(inputs)
        own = self._own(len(inputs["labels"]))
        inputs = {name: values[: max(own, 1)] for name, values in inputs.items()}
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        count = (inputs["labels"][:own, 1:] != IGNORED).sum()  # nothing comes before the first to predict it from
        self._measured.append(torch.stack([loss.detach().float() * count, count.float()]))
        return loss.detach(), None, None

    def _own(self, size: int) -> int:
        """Examples of a batch that count: those at the end of several processes' last batches are there twice."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return size
        return min(size, max(0, state.remainder - self.accelerator.process_index * size))

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The Trainer's own, but for the loss."""
        self._measured: list[torch.Tensor] = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, count = self.accelerator.reduce(torch.stack(self._measured).sum(0)).tolist()
        output.metrics[f"{metric_key_prefix}_loss"], self.tokens = total / count, int(count)
        return output
