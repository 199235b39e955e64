"""What contestants do: one layer, or a language model, forward and backward."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from doratune.study.speed import cache_of


class Task(Protocol):
    """One forward pass on fixed inputs, and its backward pass."""

    inputs: Tensor

    def forward(self, model: nn.Module) -> Tensor:
        """What the backward pass starts from."""

    def backward(self, result: Tensor) -> None:
        """Leaves gradients on the trainable parameters and on the inputs: frozen layers pass gradients on, too."""

    def output(self, model: nn.Module) -> Tensor:
        """What is compared."""


class LayerTask:
    """Tokens through one layer."""

    def __init__(self, columns: int, out: int, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(tokens, columns, generator=generator).to(device, dtype).requires_grad_()
        self.gradient = torch.randn(tokens, out, generator=generator).to(device, dtype)

    def forward(self, model: nn.Module) -> Tensor:
        return model(self.inputs)

    def backward(self, result: Tensor) -> None:
        result.backward(self.gradient)

    def output(self, model: nn.Module) -> Tensor:
        return model(self.inputs)


class ModelTask:
    """A language model's loss on random tokens; an optimiser's step is the same for all adapters and is left out.

    Embeddings are looked up beforehand, so that the floor, too, has gradients to pass through every layer. A model
    whose embeddings train looks them up itself.
    """

    def __init__(self, base: Any, tokens: int) -> None:
        device = base.get_input_embeddings().weight.device
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(base.config.vocab_size, (1, tokens), generator=generator).to(device)
        with torch.no_grad():
            self.inputs = base.get_input_embeddings()(self.ids).clone()
        self.inputs.requires_grad_()

    def _call(self, model: Any, **options: Any) -> Any:
        trains = model.get_input_embeddings().weight.requires_grad
        return model(**({"input_ids": self.ids} if trains else {"inputs_embeds": self.inputs}), **options)

    def forward(self, model: nn.Module) -> Tensor:
        return self._call(model, labels=self.ids, use_cache=False).loss

    def backward(self, result: Tensor) -> None:
        result.backward()

    def output(self, model: nn.Module) -> Tensor:
        return self._call(model, use_cache=False).logits


class DecodeTask(ModelTask):
    """The next token of a text whose keys and values are in a real cache."""

    def __init__(self, base: Any, cached: int) -> None:
        super().__init__(base, cached + 1)
        self.inputs = self.inputs.detach()
        self.caches: dict[int, dict[str, Any]] = {}

    @torch.no_grad()
    def prefill(self, model: Any) -> None:
        """Fill the model's cache anew."""
        result = model(inputs_embeds=self.inputs[:, :-1], use_cache=True)
        self.caches[id(model)] = cache_of(result)

    @torch.no_grad()
    def decode(self, model: Any) -> Tensor:
        """One step; it uses up the cache."""
        cache = self.caches.pop(id(model))
        return model(inputs_embeds=self.inputs[:, -1:], **cache, use_cache=True).logits

    def output(self, model: nn.Module) -> Tensor:
        self.prefill(model)
        return self.decode(model)
