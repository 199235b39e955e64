"""Training steps of language models."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch

from bench.bases import REAL, SHAPES, first_layers, linear_paths, llama, quantise_nf4
from bench.contestants import FULL, Setting
from bench.options import Benchmark, Options, Report, Watch
from bench.results import Point
from bench.tasks import ModelTask
from bench.trial import Trial

SHALLOW = 6
"""Deeper models are compared on so many layers in 16 bits, where rounding grows with the depth."""
WIDE, WIDE_SHALLOW = 4096, 2
"""From this hidden size on, on so many: rounding grows with the width, too."""
CHECKED_TOKENS = 256
"""Of a model that is compared apart from the race."""


VARIANTS = ("checkpointing", "nf4")


@dataclass
class Step(Benchmark):
    """A training step of a language model: forward, loss, backward; the optimiser's part is left out."""

    rank: int = 16
    """Of the adapters, which are on all linear layers but the output head."""
    tokens: int | None = None
    """In a step; none: 1,024, on a GPU 8,192 for the larger models."""
    models: tuple[str, ...] = ()
    """Names out of bench/bases.py, with /checkpointing, /nf4 or both after them; none: a choice for the device."""

    what: ClassVar[str] = "step"
    title: ClassVar[str] = "Training step of a language model"
    note: ClassVar[str] = (
        "Forward, loss and backward without the optimiser, relative to the frozen model (which passes gradients to its "
        "inputs, as every contestant does); median of paired ratios with its 95 % interval. Moved adapters on all "
        "linear layers but the head; logits and all gradients are compared with a plain reference before and after."
    )

    def points(self) -> list[Point]:
        points = []
        for name in self.models or self._choice():
            shape, _, variant = name.partition("/")
            if shape not in SHAPES or not {*variant.split("/")} <= {"", *VARIANTS}:
                known = f"one of {', '.join(SHAPES)}, and {' or '.join(f'/{v}' for v in VARIANTS)} after it"
                raise SystemExit(f"error: models: expected {known}; found {name!r}")
            tokens = self.tokens or self._tokens(shape)
            title = f"{name.replace('/', ', ')}, {tokens:,} tokens, r {self.rank}"
            points.append(Point(title, {"model": shape, "variant": variant, "tokens": tokens, "rank": self.rank}))
        return points

    def _choice(self) -> list[str]:
        if self.quick:
            return ["tiny", "tiny/checkpointing"]
        small = ["llama-6-layers", "llama-6-layers/checkpointing", "llama-6-layers/nf4", "smollm2-135m"]
        large = ["llama-1b", "llama-1b/checkpointing", "llama-1b/nf4"]
        if self.torch_device().type == "cuda":
            return [*small, *large, "llama-8b/checkpointing", "llama-8b/nf4/checkpointing"]
        return [*small, *large] if self.full else [small[0], small[1]]

    def _tokens(self, shape: str) -> int:
        if self.quick:
            return 64
        if self.torch_device().type == "cuda":
            return 1024 if shape == "llama-6-layers" else 8192
        return 512 if shape == "llama-1b" else 1024

    def measure(self, point: Point, watch: Watch) -> Report:
        trial, weights = model_trial(self, point, training=True)
        trial.race(trial.step, **self.race_options(watch))
        return trial.report(), {"weights": weights}


def model_trial(
    options: Options, point: Point, training: bool, *unwanted: str, make_task: type[ModelTask] = ModelTask
) -> tuple[Trial, str]:
    """The contestants on a point's model, and what its weights are."""
    base, weights = llama(point.shape["model"], options.torch_dtype(), options.torch_device())
    variants = point.shape.get("variant", "").split("/")
    if "checkpointing" in variants:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if "nf4" in variants:
        quantise_nf4(base)
        unwanted = (*unwanted, FULL, "LyCORIS")  # neither can train or decompose 4-bit weights
    if base.config.hidden_size >= WIDE:
        unwanted = (*unwanted, FULL)  # a copy of the weights and their gradients: nothing else would fit beside them
    tokens, names = point.shape["tokens"], options.contestants(*unwanted)
    setting = Setting(linear_paths(base), point.shape["rank"])
    twin, compared = None, WIDE_SHALLOW if base.config.hidden_size >= WIDE else SHALLOW
    if options.torch_dtype() != torch.float32 and base.config.num_hidden_layers > compared:
        part = first_layers(base, compared)
        weights += f", compared on the first {compared} layers"
        if weights.startswith(REAL):
            # Random adapters spoil real weights: rounding to 16 bits exceeds any tolerance, for every contestant.
            part = copy.deepcopy(part).float()
            weights += " in float32"
        task = make_task(part, min(tokens, CHECKED_TOKENS))
        compared_names = [name for name in names if name != FULL]  # which is a copy of its own, compared with nothing
        twin = Trial(part, Setting(linear_paths(part), setting.rank), compared_names, task, training)
    return Trial(base, setting, names, make_task(base, tokens), training, twin), weights
