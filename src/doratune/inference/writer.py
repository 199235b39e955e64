"""Text from a causal language model, with any of its adapters or none."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from doratune.checkpoint import load_adapter
from doratune.errors import AdapterError
from doratune.extras import require
from doratune.inference.loading import Loading
from doratune.inference.prompts import Prompt
from doratune.inference.sampling import Sampling
from doratune.inference.sources import BASE, Sources, loading_base, tokenizer_source
from doratune.merge import merge
from doratune.model import adapter_names, disabled, set_adapter
from doratune.train.chats import refuse_halves
from doratune.train.device import explaining_memory, to_device
from doratune.train.gather import BadRow
from doratune.train.models import context_length, give_padding, load_tokenizer, load_writing
from doratune.train.tasks.text import refuse_encoders
from doratune.train.tokens import opening, plain, written

LISTED = 20
"""Prompts that do not fit which are listed one by one."""
_LESS = "try a smaller batch_size, fewer max_tokens, or dtype bfloat16"


@dataclass(frozen=True)
class Completion:
    """What was written after one prompt."""

    prompt: Prompt
    adapter: str | None
    """None: the base model, or a model without adapters. A merged one keeps its name."""
    text: str
    tokens: int
    ended: bool
    """Whether the model ended its text; False: max_tokens cut it."""


class Writer:
    """A model with its tokenizer; the model's adapters can be switched.

    Args:
        model: a causal language model, with adapters attached or without.
        tokenizer: its tokenizer.
        merged: what the model is called, if an adapter is in its weights; None: it is the base.
        called: what its adapters are called here, in the order they were attached; empty: as they were attached.
    """

    def __init__(self, model: Any, tokenizer: Any, merged: str | None = None, called: Iterable[str] = ()) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        attached = adapter_names(model)
        self._attached = dict(zip(called or attached, attached, strict=True))
        self.adapters = list(self._attached)
        self.merged = merged
        give_padding(tokenizer)

    @classmethod
    def load(cls, sources: Sources, dtype: str = "auto", merged: bool = False, quantize: str | None = "auto") -> Writer:
        """Load base model, adapters and tokenizer.

        Args:
            sources: where they are.
            dtype: of the base weights; "auto": as in training, else as ``doratune train`` chooses it.
            merged: put the adapter into the weights, which writes fastest; then it cannot be switched off.
            quantize: load the base in 4 or 8 bits, a kind of ``doratune train``; "auto": as in training; None: in full
                precision.

        Raises:
            AdapterError: if something cannot be loaded, the model has no head that writes or has an encoder, several
                adapters are to be merged, or were trained on the base in different ways.
        """
        if merged and len(sources.adapters) != 1:
            raise AdapterError(f"merging takes one adapter; found {len(sources.adapters)}")
        loading = Loading.choose(sources.noted(), dtype, quantize, merged)
        with loading_base(sources.base, sources.named):
            tokenizer = load_tokenizer(tokenizer_source(sources.adapters.values(), sources.base))
            weights, options = loading.options()
            model, new = load_writing(sources.base, weights, options)
        if not hasattr(model, "generate"):
            raise AdapterError(f"model {sources.base} is a {type(model).__name__}, which does not write text")
        if not sources.adapters:  # an adapter may bring a head
            _refuse_new_head(model, sources.base, new)
        refuse_encoders(sources.base)
        model = to_device(model)
        for number, folder in enumerate(sources.adapters.values()):
            load_adapter(model, folder, str(number))  # folders have names that no adapter can have, such as "train"
        if merged:
            merge(model)
            return cls(model, tokenizer, next(iter(sources.adapters)))
        return cls(model, tokenizer, called=sources.adapters)

    def check(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Find out whether prompts can be continued, before time is spent on any.

        Returns:
            Their tokens.

        Raises:
            AdapterError: listing those that are empty or longer than the model's context, or if a chat cannot be
                rendered.
        """
        context = context_length(self.model.config)
        rows: list[list[int]] = []
        problems = []
        for number, prompt in enumerate(prompts, 1):
            text = prompt.render(self.tokenizer)
            name = prompt.where or f"prompt {number}"
            try:
                refuse_halves(text, name)  # as bytes of a terminal or a pipe become that are no UTF-8
            except BadRow as error:
                problems.append(str(error))
                continue
            ids = (opening if prompt.messages is None else plain)(text, self.tokenizer)
            rows.append(ids)
            if not ids:
                problems.append(f"{name} is empty")
            elif context and len(ids) >= context:
                problems.append(f"{name} has {len(ids)} tokens, the model's context is {context}; shorten it")
        if problems:
            raise AdapterError.of("prompts", problems, at_most=LISTED)
        return rows

    @contextlib.contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Within this context the model has this adapter, or none."""
        if adapter is None:
            with disabled(self.model):
                yield
        elif adapter in self._attached:
            set_adapter(self.model, self._attached[adapter])
            yield
        else:
            raise AdapterError(f"the model has no adapter {adapter!r}; it has {', '.join(self.adapters) or 'none'}")

    def write(
        self, prompts: Sequence[Prompt], sampling: Sampling, adapter: str | None = None, streamer: Any = None
    ) -> list[Completion]:
        """Continue prompts, all in one batch.

        Args:
            prompts: at least one.
            sampling: how.
            adapter: name of an adapter; None: the model without one, which is the base unless it was merged.
            streamer: transformers' streamer, told of every token; one prompt only.

        Raises:
            AdapterError: listing prompts that are longer than the model's context; if a chat is asked of a tokenizer
                without a chat template, or memory is short.
        """
        rows = self.check(prompts)
        context = context_length(self.model.config)
        longest = max(map(len, rows))
        room = context - longest if context else None
        if room is not None and room < sampling.max_tokens and min(map(len, rows)) < longest:
            # Shorter prompts have more room than the longest: their texts must not depend on what shares the batch.
            ones = map(sampling.later, range(len(prompts)))
            return [self.write([one], own, adapter)[0] for one, own in zip(prompts, ones, strict=True)]
        # Padding on the left, where generation needs it. Attention does not see it, but before transformers 5.23 a
        # repetition penalty does: it is a token of the prompt, or else the end of the text would become less likely.
        filled = torch.tensor([[row[0]] * (longest - len(row)) + row for row in rows], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.model.device)
        require("transformers").set_seed(sampling.seed)
        ends = self._ends()
        with torch.no_grad(), self.using(adapter), explaining_memory(_LESS):
            written = self.model.generate(
                input_ids=filled,
                attention_mask=mask,
                **sampling.options(room),
                eos_token_id=ends or None,
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=streamer,
            )
        return [
            self._completion(prompt, adapter or self.merged, ids, row[longest:].tolist(), ends)
            for prompt, ids, row in zip(prompts, rows, written, strict=True)
        ]

    def _completion(
        self, prompt: Prompt, adapter: str | None, ids: list[int], new: list[int], ends: list[int]
    ) -> Completion:
        place = next((place for place, token in enumerate(new) if token in ends), None)
        new = new if place is None else new[:place]
        return Completion(prompt, adapter, written(ids, new, self.tokenizer), len(new), place is not None)

    def _ends(self) -> list[int]:
        """Tokens that end a text: the model's, which may be several, and the tokenizer's."""
        found = self.model.generation_config.eos_token_id
        known = found if isinstance(found, list) else [found]
        return sorted({token for token in (*known, self.tokenizer.eos_token_id) if token is not None})


def streamer(tokenizer: Any, skip_prompt: bool) -> Any:
    """transformers' streamer to stdout, for ``Writer.write``."""
    return require("transformers").TextStreamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)


def label(adapter: str | None) -> str:
    """What a model with this adapter is called in print."""
    return adapter or BASE


def _refuse_new_head(model: Any, base: str, new: Collection[str]) -> None:
    """A head that the model's files do not hold was made up, and what it writes is noise.

    Raises:
        AdapterError: if nothing of the head is in the files; one tied to the input embedding need not be.
    """
    inner = f"{model.base_model_prefix}."
    own = [name for name, _ in model.named_parameters() if not name.startswith(inner)]  # tied ones come once, inside
    if own and set(own) <= set(new):
        head = sorted({name.rpartition(".")[0] for name in own})
        raise AdapterError(
            f"model {base} holds no weights of the head that writes ({', '.join(head)}), which would be random: is it "
            "an encoder, or the inner part of a language model? Name a model with its language-model head"
        )
