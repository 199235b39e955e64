"""TrainConfig: every option of a training run, declared once for Python, the command line and recipes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from doratune.config import AdapterConfig, Method
from doratune.errors import AdapterError
from doratune.train import checks
from doratune.train.choices import (
    Augmentation,
    Dtype,
    Optimizer,
    Quantize,
    Reporter,
    Schedule,
    TaskName,
    TrainMethod,
)
from doratune.train.option_types import wrong_types

SPLIT_SEED = 0
"""The held-out part is the same whatever the seed of the run, so that runs can be compared."""


def _pairs(number: type[int] | type[float]) -> tyro.constructors.PrimitiveConstructorSpec[Any]:
    """Names with numbers as one flag; of those that a recipe gives tyro would make a flag of each name."""

    def read(words: list[str]) -> dict[str, float]:
        try:
            return {name: number(value) for name, value in zip(words[::2], words[1::2], strict=True)}
        except ValueError:
            raise ValueError(f"expected names, each with a number; found {' '.join(words)}") from None

    pair = f"STR {number.__name__.upper()}"
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[{pair} [{pair} ...]]",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda value: [str(word) for pair in value.items() for word in pair],
    )


@dataclass(frozen=True)
class AdapterOptions(AdapterConfig):
    """AdapterConfig as flags. Nothing is declared anew; values are checked with those of the run, all at once."""

    method: Annotated[Method, tyro.conf.Suppress] = AdapterConfig.method
    # A flag takes words: several are names, a single one may also be a regular expression.
    targets: tuple[str, ...] | str = AdapterConfig.targets  # type: ignore[assignment]
    exclude: tuple[str, ...] | str = AdapterConfig.exclude  # type: ignore[assignment]
    eight_bit_outputs: tuple[str, ...] | str = AdapterConfig.eight_bit_outputs  # type: ignore[assignment]
    rank_pattern: Annotated[Mapping[str, int], _pairs(int)] = field(default_factory=dict)
    alpha_pattern: Annotated[Mapping[str, float], _pairs(float)] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checked by ``TrainConfig.adapter_config``."""


ADAPTER_OPTIONS = tuple(f.name for f in dataclasses.fields(AdapterOptions) if f.name != "method")
"""Those that are flags and keys of a recipe: the method is the run's."""


@dataclass
class TrainConfig:
    """Fine-tune a language model on text, or a language or vision model to classify.

    Writes to the output folder: the adapter (PEFT's format), metrics.jsonl, curves.png, results.json, recipe.toml,
    checkpoints.
    """

    model: str
    """Base model: a folder, or a name on the model hub."""
    data: tuple[str, ...]
    """What to train on: files (.jsonl, .json, .csv, .tsv, .parquet, .txt; images: folders, .npz), a folder written by
    datasets' save_to_disk, or a name on the hub."""
    output: Path = Path("runs/train")
    """Folder for everything the run writes; new or empty, unless the run is resumed."""
    recipe: str | None = None
    """TOML file with values for these options, or the name of a shipped recipe; flags win over it."""
    print_recipe: bool = False
    """Print every option, its value and where that came from, and stop."""

    task: TaskName = "text-generation"
    """What to learn."""
    method: TrainMethod = AdapterConfig.method
    """dora; lora; magnitude: row magnitudes only; full: every weight; head: the output head only (linear probe)."""
    adapter: Annotated[AdapterConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=AdapterOptions)
    """The adapter."""
    start_from: str | None = None
    """Adapter (PEFT's format; a folder, or a name on the hub) whose values training begins with; a plain LoRA becomes
    DoRA with --method dora."""

    eval_data: tuple[str, ...] = ()
    """What to measure on; none: a part of the data is held out."""
    eval_fraction: float = 0.1
    """Share held out if there is no eval data, of what test_fraction leaves; always the same, whatever the seed."""
    split: str = "train"
    """Which split to train on, of data sets that have several (hub, save_to_disk)."""
    eval_split: str = "test"
    """Which split to measure on, of eval data that have several."""
    test_data: tuple[str, ...] = ()
    """What is measured once, after training: for numbers to report, where eval data served to choose something."""
    test_fraction: float = 0.0
    """Share of the data set aside for that if there is no test data; always the same, whatever the seed."""
    test_split: str = "test"
    """Which split that is, of test data that have several."""
    text_column: str | None = None
    """Column of the text; none: guessed from the names, and said. The same holds for the other columns."""
    prompt_column: str | None = None
    """Column of the prompt; no loss is taken on it."""
    completion_column: str | None = None
    """Column of the completion."""
    messages_column: str | None = None
    """Column of the chat: a list of {role, content}."""
    label_column: str | None = None
    """Column of the class."""
    image_column: str | None = None
    """Column of the image, or of its path."""
    prompt_template: str | None = None
    """Prompt made of columns, such as "Question: {question}\\nAnswer: "; needs no prompt column."""
    as_chat: bool = False
    """Put prompt and completion into the model's chat template, as user and assistant."""
    skip_bad: bool = False
    """Go on without rows and images that cannot be used, and count them; otherwise they are listed as an error."""
    streaming: bool = False
    """Read text while training, for data larger than memory; needs steps. Order is shuffled in a window only."""

    max_length: int = 512
    """Tokens in a block of joined documents, or at which prompts, chats and texts to classify are cut."""
    packing: bool | None = None
    """Put several texts into one block; none: documents yes, prompts and chats no."""
    loss_on: Literal["completion", "all"] = "completion"
    """Where there is a prompt or chat: learn what the assistant says only, or all of it."""
    image_size: int | None = None
    """Pixels of the square that images are scaled to; none: as the model was pretrained."""
    augment: tuple[Augmentation, ...] = ()
    """Random changes of training images: crop (60 to 100 % of the area), flip (left-right), rotate (15 degrees),
    color."""
    workers: int = 0
    """Processes that prepare data while the model computes; a stream takes one."""

    steps: int | None = None
    """Optimiser steps; none: as many as the epochs take."""
    epochs: float = 1.0
    """Passes over the data, if steps are not given."""
    batch_size: int = 4
    """Examples or blocks per forward pass and device."""
    gradient_accumulation: int = 1
    """Forward passes per optimiser step."""
    optimizer: Optimizer = "adamw"
    """8-bit and paged ones come with bitsandbytes and keep their state in a quarter of the memory."""
    learning_rate: float = 2e-4
    """Highest learning rate."""
    magnitude_learning_rate: float | None = None
    """Learning rate of the magnitudes; none: that of the rest."""
    lora_plus_ratio: float = 1.0
    """Learning rate of B relative to the rest (LoRA+, arXiv 2402.12354, recommends 16)."""
    weight_decay: float = 0.0
    """Weight decay of A, B and whole weights; biases get none."""
    magnitude_weight_decay: float = 0.0
    """Weight decay of the magnitudes; it pulls them to 0, not to where they started."""
    warmup: float = 0.03
    """Warm-up: a number of steps, or below 1 the share of all steps, of which it leaves one at least."""
    schedule: Schedule = "linear"
    """Learning rate after the warm-up."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0: they are not."""
    seed: int = 0
    """Start values of adapter and head, order of the data, augmentation, dropout."""
    dtype: Dtype = "auto"
    """Of the base weights; auto: bfloat16 on a GPU that has it (not for full and head), else float32. Adapters stay
    float32."""
    quantize: Quantize | None = None
    """Load the base in 4 or 8 bits (QDoRA): nf4 and int8 by bitsandbytes, torchao-int8 and torchao-int4 by torchao.
    Arithmetic is in dtype."""
    double_quant: bool = True
    """nf4: whether its scales are quantised, too (saves 0.4 bits a weight)."""
    fsdp: bool = False
    """Spread the base over the processes that torchrun started (FSDP2), for models too large for one device; else every
    process has a copy (DDP)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """torch.compile the model: a minute or more before the first step, fewer and faster operations after it."""
    attention: str | None = None
    """How attention is computed: sdpa, eager, flex_attention, flash_attention_2, ...; none: transformers' choice."""

    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int | None = None
    """Steps between measurements on held-out data; none: before and after training only."""
    keep_best: bool = False
    """Keep what had the lowest held-out loss, not what came last; a checkpoint is written with every measurement."""
    patience: int | None = None
    """With keep_best: stop after so many measurements in a row without a lower loss; none: do all steps."""
    save_every: int | None = 200
    """Steps between checkpoints; none: no checkpoints but on Ctrl-C."""
    keep: int = 2
    """Checkpoints to keep."""
    resume: bool = False
    """Go on from the last complete checkpoint in the output folder."""
    report_to: tuple[Reporter, ...] = ()
    """Also send metrics to tensorboard, wandb or trackio; metrics.jsonl is always written."""
    prompt: str | None = None
    """Text to be continued before and after training, as a sample."""
    sample_tokens: int = 60
    """Length of the sample."""

    def __post_init__(self) -> None:
        """Paths and strings are taken for each other; tyro passes its MISSING for what is not typed yet."""
        output: Any = self.output
        if isinstance(output, str):
            self.output = Path(output)
        for name in ("model", "start_from"):
            if isinstance(given := getattr(self, name), Path):
                setattr(self, name, str(given))
        for name in ("data", "eval_data", "test_data"):
            given = getattr(self, name)
            if isinstance(given, str | Path):
                given = (given,)
            if isinstance(given, list | tuple):
                setattr(self, name, tuple(str(one) if isinstance(one, Path) else one for one in given))

    @property
    def is_adapter(self) -> bool:
        """Whether the method trains an adapter, and not the model's own weights."""
        return self.method not in ("full", "head")

    def adapter_config(self, head: Sequence[str] = ()) -> AdapterConfig | None:
        """The adapter to attach; None where the model's own weights are trained.

        Args:
            head: modules that are trained whole besides those named, such as a new classification head.

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
        values["method"] = self.method if self.method in get_args(Method) else "dora"
        if self.method == "magnitude":
            values["rank"], values["rank_pattern"] = 0, {}
        values["modules_to_save"] = tuple(dict.fromkeys([*values["modules_to_save"], *head]))
        config = AdapterConfig(**values)
        return config if self.is_adapter else None

    def wrong_types(self) -> list[str]:
        """Values that are none of their options'; with them nothing else can be looked at."""
        found = [*wrong_types(self, "adapter")]
        adapter: object = self.adapter
        if not isinstance(adapter, AdapterConfig):
            found.append(f"adapter: expected AdapterOptions(...), found {adapter!r}")
        return found

    def problems(self) -> Iterator[str]:
        """Everything that can be found wrong without reading data or a model."""
        if wrong := self.wrong_types():
            yield from wrong
            return
        if not self.model:
            yield "model: name a folder or a model of the hub"
        if not self.data:
            yield "data: name at least one file, folder or data set of the hub"
        yield from checks.numbers(self)
        yield from checks.combinations(self)
        yield from checks.libraries(self)
        try:
            self.adapter_config()
        except AdapterError as error:
            yield from error.problems


def comparable(value: Any) -> Any:
    """An option's value, alike where it means the same: names in any order, a single one alone or in a list."""
    value = [value] if isinstance(value, str) else value
    return sorted(value) if isinstance(value, list | tuple) else value


def _names_or_expression(value: str | Sequence[str]) -> str | tuple[str, ...]:
    """A single word that is no name is "all-linear" or a regular expression, as in AdapterConfig."""
    words = (value,) if isinstance(value, str) else tuple(value)
    is_names = len(words) != 1 or re.fullmatch(r"\w+(\.\w+)*", words[0])
    return words if is_names else words[0]
