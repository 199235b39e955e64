"""How data are read to measure on: as asked, else as in training, else by the defaults of ``doratune train``."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from doratune.errors import AdapterError
from doratune.inference.loading import Loading, QuantizeToUse
from doratune.train.checks import quantize_problems
from doratune.train.choices import Dtype, TaskName
from doratune.train.columns import as_flag
from doratune.train.config import TrainConfig
from doratune.train.information import Information
from doratune.train.prompt_template import fields_of
from doratune.train.sources import columns_of, has_columns

COLUMNS = ("text_column", "prompt_column", "completion_column", "messages_column", "prompt_template")
"""What says of which kind texts are: where one is given, all those of training give way."""
TAKEN: Mapping[str, tuple[str, ...]] = {
    "text-generation": (*COLUMNS, "as_chat", "loss_on", "max_length", "packing"),
    "text-classification": ("text_column", "label_column", "max_length"),
    "image-classification": ("image_column", "label_column"),
}
"""Options that have an effect on each task."""


@dataclass(frozen=True)
class Measuring:
    """How the data are read and measured; none: as in training, else as `doratune train` does by default."""

    text_column: str | None = None
    """Column of the text; none: that of training where the data have it, else guessed. The same holds for the other
    columns."""
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
    as_chat: bool | None = None
    """Put prompt and completion into the model's chat template, as user and assistant."""
    loss_on: Literal["completion", "all"] | None = None
    """Where there is a prompt or chat: measure what the assistant says only, or all of it."""
    max_length: int | None = None
    """Tokens in a block of joined documents, or at which prompts, chats and texts to classify are cut."""
    packing: bool | None = None
    """Put several texts into one block."""
    split: str = TrainConfig.eval_split
    """Which split, of data sets that have several (hub, save_to_disk)."""
    skip_bad: bool = False
    """Go on without rows and images that cannot be used, and count them; otherwise they are listed as an error."""
    batch_size: int = TrainConfig.batch_size
    """Examples or blocks at a time."""
    dtype: Dtype = "auto"
    """Of the base weights; auto: as in training, else bfloat16 on a GPU that has it, else float32."""
    quantize: QuantizeToUse = "auto"
    """Load the base in 4 or 8 bits; auto: as in training; none: in full precision."""

    def problems(self, task: str | None) -> Iterator[str]:
        """Options that cannot work, or have no effect on a task, if that is known."""
        for name in ("max_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{name} must be above 0; found {value!r}"
        yield from quantize_problems(self.quantize)
        some = {option for options in TAKEN.values() for option in options}
        for option in self._given():
            if task and option in some and option not in TAKEN[task]:
                yield f"{option} is without effect on {task}; leave it out"

    def config(self, task: TaskName, base: str, data: Sequence[str], noted: Mapping[str, Information]) -> TrainConfig:
        """The same as options of a run.

        Args:
            task: of the model.
            base: the base model.
            data: what to measure on.
            noted: what was noted in training, by the names of those that are to be measured on the same tokens.

        Raises:
            AdapterError: listing every option that has to be given as they were trained differently.
        """
        loading = self.loading(noted)
        given = self._given() | {"dtype": loading.dtype, "quantize": loading.quantize}
        tables = [name for name in data if has_columns(name)]
        columns = columns_of(tables, self.split)[0] if tables else []
        told = {name: _told(about, columns) for name, about in noted.items()}
        taken = [option for option in TAKEN[task] if option not in given]
        if task == "text-generation" and any(option in given for option in COLUMNS):
            taken = [option for option in taken if option not in COLUMNS]
        problems = []
        for option in taken:
            values = {name: options.get(option) for name, options in told.items()}
            if len(set(values.values())) > 1:
                listed = ", ".join(f"{name} {value!r}" for name, value in values.items())
                problems.append(f"{option}: {listed}; say which with {as_flag(option)}")
            elif (value := next(iter(values.values()), None)) is not None:
                given[option] = value
        if problems:
            raise AdapterError.of("trained in different ways, to be measured in one", problems)
        for about in noted.values():
            if about.method in ("full", "head"):  # whose dtype is another where it is chosen
                given["method"] = about.method
        return TrainConfig(base, tuple(data), task=task, **given)

    def loading(self, noted: Mapping[str, Information]) -> Loading:
        """How the base is loaded, as in ``Loading.choose``."""
        return Loading.choose(noted, self.dtype, self.quantize)

    def _given(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def _told(about: Information, columns: Collection[str]) -> dict[str, Any]:
    """What was noted, as options: columns where the data have them."""
    options = {name: getattr(about, name) for name in ("as_chat", "loss_on", "max_length", "packing")}
    template = about.prompt_template
    if template is not None and set(fields_of(template)) <= set(columns):
        options["prompt_template"] = template
    return options | {f"{role}_column": column for role, column in about.columns.items() if column in columns}
