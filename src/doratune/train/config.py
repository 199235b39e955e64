"""TrainConfig: every option of a training run, declared once for Python, the command line and recipes."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from doratune.config import ALL_LINEAR, AdapterConfig, Method
from doratune.errors import AdapterError

TrainMethod = Literal["dora", "lora", "magnitude", "full"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Schedule = Literal["linear", "cosine", "constant"]
SPLIT_SEED = 0
"""The held-out part is the same whatever the seed of the run, so that runs can be compared."""


@dataclass(frozen=True)
class AdapterOptions(AdapterConfig):
    """AdapterConfig as flags. Nothing is declared anew; values are checked with those of the run, all at once."""

    method: Annotated[Method, tyro.conf.Suppress] = AdapterConfig.method
    # A flag takes words: several are names, a single one may also be a regular expression.
    targets: tuple[str, ...] | str = AdapterConfig.targets  # type: ignore[assignment]
    exclude: tuple[str, ...] | str = AdapterConfig.exclude  # type: ignore[assignment]
    eight_bit_outputs: tuple[str, ...] | str = AdapterConfig.eight_bit_outputs  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Checked by ``TrainConfig.adapter_config``."""


@dataclass
class TrainConfig:
    """Fine-tune a causal language model on text files.

    Writes to the output folder: the adapter (PEFT's format), metrics.jsonl, curves.png, results.json, checkpoints.
    """

    model: str
    """Base model: a folder, or a name on the model hub."""
    data: tuple[str, ...]
    """Text files (UTF-8) to train on; each is one document."""
    output: Path = Path("runs/train")
    """Folder for everything the run writes; new or empty, unless the run is resumed."""
    recipe: Path | None = None
    """TOML file with values for these options; flags win over it."""

    method: TrainMethod = AdapterConfig.method
    """dora; lora; magnitude: row magnitudes only; full: every weight, for comparison."""
    adapter: Annotated[AdapterConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=AdapterOptions)
    """The adapter."""

    eval_data: tuple[str, ...] = ()
    """Text files to measure on; none: a part of the data is held out."""
    eval_fraction: float = 0.1
    """Share of the blocks held out if there is no eval data; always the same ones, whatever the seed."""
    max_length: int = 512
    """Tokens in a block; documents are joined and cut into blocks."""
    steps: int | None = None
    """Optimiser steps; none: as many as the epochs take."""
    epochs: float = 1.0
    """Passes over the data, if steps are not given."""
    batch_size: int = 4
    """Blocks per forward pass and device."""
    gradient_accumulation: int = 1
    """Forward passes per optimiser step."""
    learning_rate: float = 2e-4
    """Highest learning rate (AdamW)."""
    magnitude_learning_rate: float | None = None
    """Learning rate of the magnitudes; none: that of the rest."""
    weight_decay: float = 0.0
    """Weight decay of A, B and whole weights; biases get none."""
    magnitude_weight_decay: float = 0.0
    """Weight decay of the magnitudes; it pulls them to 0, not to where they started."""
    warmup: float = 0.03
    """Warm-up: a number of steps, or below 1 the share of all steps."""
    schedule: Schedule = "linear"
    """Learning rate after the warm-up."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0: they are not."""
    seed: int = 0
    """Start values of the adapter, order of the data, dropout."""
    dtype: Dtype = "auto"
    """Of the base weights; auto: bfloat16 on a GPU that has it (not for full), else float32. Adapters are float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int | None = None
    """Steps between measurements on held-out text; none: before and after training only."""
    save_every: int | None = 200
    """Steps between checkpoints; none: no checkpoints, so the run cannot be resumed."""
    keep: int = 2
    """Checkpoints to keep."""
    resume: bool = False
    """Go on from the last complete checkpoint in the output folder."""
    prompt: str | None = None
    """Text to be continued before and after training, as a sample."""
    sample_tokens: int = 60
    """Length of the sample."""

    def adapter_config(self) -> AdapterConfig | None:
        """The adapter to attach; None for full fine-tuning.

        Raises:
            AdapterError: listing every option that cannot work.
        """
        values = {f.name: getattr(self.adapter, f.name) for f in dataclasses.fields(AdapterConfig)}
        if self.adapter.method not in (AdapterConfig.method, self.method):
            raise AdapterError(
                f"method is {self.method!r}, but the adapter's is {self.adapter.method!r}; set method alone"
            )
        for name in ("targets", "exclude", "eight_bit_outputs"):
            values[name] = _names_or_expression(values[name])
        values["method"] = "dora" if self.method in ("magnitude", "full") else self.method
        if self.method == "magnitude":
            values["rank"], values["rank_pattern"] = 0, {}
        config = AdapterConfig(**values)
        return None if self.method == "full" else config

    def problems(self) -> Iterator[str]:
        """Everything that can be found wrong without reading data or a model."""
        if not self.model:
            yield "model: name a folder or a model of the hub"
        if not self.data:
            yield "data: name at least one text file"
        positive = ("max_length", "batch_size", "gradient_accumulation", "log_every", "keep", "epochs", "learning_rate")
        for name in positive:
            value = getattr(self, name)
            if not 0 < value < math.inf:
                yield f"{name} must be above 0; found {value!r}"
        for name in ("steps", "eval_every", "save_every", "magnitude_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                yield f"{name} must be above 0, or absent; found {value!r}"
        for name in ("weight_decay", "magnitude_weight_decay", "warmup", "max_grad_norm", "sample_tokens", "seed"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                yield f"{name} must be at least 0; found {value!r}"
        if not self.eval_data and not 0 < self.eval_fraction < 1:
            yield f"eval_fraction must lie between 0 and 1; found {self.eval_fraction!r}"
        if self.resume and self.save_every is None:
            yield "resume needs checkpoints, but save_every is absent"
        try:
            self.adapter_config()
        except AdapterError as error:
            yield from listed(error)


def listed(error: AdapterError) -> list[str]:
    """The problems that one AdapterError lists, to be listed with others."""
    first, *others = str(error).split("\n")
    return [line.removeprefix("  - ") for line in others] or [first]


def _names_or_expression(value: object) -> object:
    """One word that is more than a name is a regular expression, as in AdapterConfig; all else are names."""
    words = [value] if isinstance(value, str) else list(value)  # type: ignore[call-overload]
    if len(words) != 1 or words[0] == ALL_LINEAR:
        return value if isinstance(value, str) else (words[0] if words == [ALL_LINEAR] else tuple(words))
    return tuple(words) if re.fullmatch(r"\w+(\.\w+)*", words[0]) else words[0]
