"""What adapters cost on one causal language model: training step, bytes kept for backward, decode step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from doratune.checkpoint import load_adapter
from doratune.config import AdapterConfig
from doratune.errors import AdapterError
from doratune.merge import verify_merge
from doratune.model import attach, disabled, set_adapter
from doratune.study.footprint import saved_bytes
from doratune.study.moved import moved_adapter, round_factor
from doratune.study.race import Lane, Timing, race
from doratune.targets import adapted_layers

FROZEN, LORA, DORA, GIVEN = "frozen", "lora", "dora", "given"
CACHED = 64
"""Tokens whose keys and values are in the cache when one more is decoded."""
Watch = Callable[[str, float], Any]


@dataclass(frozen=True)
class Cost:
    """One way to run the model."""

    name: str
    """frozen: without adapters; lora, dora: new adapters; given: the user's own."""
    step: Timing
    """Forward, loss and backward; the frozen model passes gradients on to its inputs."""
    saved: int
    """Bytes kept for the backward pass."""
    decode: Timing | None
    """One more token, adapters unmerged; None for models without a cache of keys and values."""


def measure_speed(
    model: Any,
    config: AdapterConfig,
    ids: Tensor,
    *,
    adapter: Path | None = None,
    seconds: float = 20.0,
    rounds: int = 100,
    watch: Watch | None = None,
) -> list[Cost]:
    """Race the model without adapters, with LoRA and with DoRA, all at the same rank and moved from their start.

    Args:
        model: a causal language model of transformers without adapters; gets adapters, whose values are random.
        config: rank, targets, dropout; raced with both methods.
        ids: tokens ``[batch, length]``, more than one of them.
        adapter: folder of one more adapter to race.
        seconds: length of each of the two races; slow models make them longer.
        rounds: a race has no more rounds than these.
        watch: called with what is being done and the share of it that is over.

    Raises:
        AdapterError: if the adapters cannot be attached, or outputs were wrong: then there is no speed to report.
    """
    names = [LORA, DORA]
    attach(model, replace(config, method="lora"), LORA)
    attach(model, replace(config, method="dora"), DORA)
    if adapter is not None:
        load_adapter(model, adapter, GIVEN, trainable=True)
        names.append(GIVEN)
    _move(model)
    contest = _Contest(model, ids, names)
    with contest.input_gradients():
        contest.verify()
        model.train()
        saved = {name: contest.saved(name) for name in (FROZEN, *names)}
        options: dict[str, Any] = {"seconds": seconds, "rounds": rounds, "device": ids.device}
        steps = race(contest.lanes(contest.step), FROZEN, **options, watch=_watch(watch, "training steps"))
        model.eval()
        decodes: list[Any] = [None] * len(steps)
        if contest.has_cache():
            lanes = contest.lanes(contest.decode, contest.prefill)
            decodes = race(lanes, FROZEN, **options, watch=_watch(watch, "decode steps"))
        contest.verify()
    return [Cost(step.name, step, saved[step.name], decode) for step, decode in zip(steps, decodes, strict=True)]


def _watch(watch: Watch | None, what: str) -> Callable[[int, float], Any] | None:
    return None if watch is None else lambda _, share: watch(what, share)


@torch.no_grad()
def _move(model: Any) -> None:
    """Give LoRA and DoRA the same random values."""
    for seed, layer in enumerate(adapted_layers(model).values()):
        rows = layer.weight_rows()
        for name in (LORA, DORA):
            if name in layer.lora_A:
                adapter = layer.adapters[name]
                moved = moved_adapter(rows.tiles(), rows.shape, adapter.rank, adapter.scale, seed, rows.matrices)
                layer.lora_A[name].copy_(moved.A)
                layer.lora_B[name].copy_(moved.B)
                if name in layer.magnitude:
                    layer.magnitude[name].copy_(moved.m)


def cache_of(output: Any) -> dict[str, Any]:
    """Keys and values of a forward, as an argument of the next; transformers before 5.24 has another name for it."""
    name = "cache" if hasattr(output, "cache") else "past_key_values"
    return {name: getattr(output, name, None)}


class _Contest:
    """The model in all its roles: one set of weights, adapters switched between timed runs."""

    def __init__(self, model: Any, ids: Tensor, names: list[str]) -> None:
        self.model, self.ids, self.names = model, ids, names
        self.cache: dict[str, Any] = {}
        self.start = {
            name: [(p, p.detach().clone()) for layer in adapted_layers(model).values() if name in layer.adapters
                   for p in layer.adapter_parameters(name)]
            for name in names
        }  # fmt: skip

    @contextlib.contextmanager
    def input_gradients(self) -> Iterator[None]:
        """Let gradients pass through the whole model, without adapters too."""
        embeddings = self.model.get_input_embeddings()
        handle = embeddings.register_forward_hook(
            lambda module, inputs, output: output.requires_grad_() if torch.is_grad_enabled() else None
        )
        try:
            yield
        finally:
            handle.remove()

    def lanes(self, run: Callable[[], Any], before: Callable[[], Any] | None = None) -> list[Lane]:
        def lane(name: str) -> Lane:
            role = contextlib.ExitStack()  # entered untimed: switching adapters off walks through the whole model

            def prepare(round_number: int) -> None:
                self.choose(name, round_number)
                role.enter_context(self.role(name))
                if before is not None:
                    before()

            return Lane(name, run, prepare, role.close)

        return [lane(name) for name in (FROZEN, *self.names)]

    def role(self, name: str) -> contextlib.AbstractContextManager[Any]:
        return disabled(self.model) if name == FROZEN else contextlib.nullcontext()

    @torch.no_grad()
    def choose(self, name: str, round_number: int) -> None:
        """Switch to an adapter, change its values a little, drop gradients."""
        if name != FROZEN:
            set_adapter(self.model, name)
            for parameter, start in self.start[name]:
                parameter.copy_(start * round_factor(round_number))
        self.model.zero_grad(set_to_none=True)

    def forward(self) -> Tensor:
        return self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss

    def step(self) -> None:
        self.forward().backward()

    def saved(self, name: str) -> int:
        self.choose(name, 0)
        with self.role(name):
            return saved_bytes(self.forward, [*self.model.parameters(), *self.model.buffers(), self.ids])

    @torch.no_grad()
    def prefill(self) -> None:
        self.cache = cache_of(self.model(input_ids=self.ids[:1, :CACHED], use_cache=True))

    @torch.no_grad()
    def decode(self) -> Any:
        return self.model(input_ids=self.ids[:1, -1:], **self.cache, use_cache=True)

    def has_cache(self) -> bool:
        self.prefill()
        return None not in self.cache.values()

    def verify(self) -> None:
        """Compare each layer with its merged weight."""
        wrong = []
        for name in self.names:
            self.choose(name, 0)
            wrong += [
                f"{name}, {check.path}: merged and unmerged differ by {check.difference:.1e}, "
                f"rounding explains {check.tolerance:.1e}"
                for check in verify_merge(self.model)
                if not check.holds
            ]
        if wrong:
            raise AdapterError.of("outputs are wrong on this model, so no speed is reported", wrong)
