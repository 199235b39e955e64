"""Adapters and models measured on other data, in the way in which a run measures its held-out data."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from doratune.errors import AdapterError
from doratune.extras import require
from doratune.inference.measuring import Measuring
from doratune.inference.predictor import Classifier, Predictor
from doratune.inference.sources import BASE, find_sources, folder_name, loading_base, task_of_folder, tokenizer_source
from doratune.inference.writer import Writer
from doratune.train.assemble import autocast, make_trainer
from doratune.train.choices import TaskName
from doratune.train.config import TrainConfig
from doratune.train.device import explaining_memory
from doratune.train.information import Information
from doratune.train.models import CLASSIFIERS, choose_dtype, load_tokenizer
from doratune.train.packing import refuse_leaks
from doratune.train.results import perplexity
from doratune.train.sources import is_hub_name, path_of
from doratune.train.tasks import task_of, text
from doratune.train.tasks.batches import Packed
from doratune.train.tasks.prepared import Prepared


@dataclass(frozen=True)
class Measured:
    """What a base model, an adapter or a whole model reached."""

    name: str
    folder: str | None
    """Of the adapter or whole model; None: the base model."""
    base: str
    """Where the base model is; of a whole model its own folder."""
    loss: float
    examples: int
    """Blocks, prompts, chats, texts or images."""
    tokens: int | None = None
    """On which the loss was taken; None: it is a classifier's."""
    accuracy: float | None = None
    """Share of right answers, of a classifier."""

    @property
    def perplexity(self) -> float | None:
        """exp of the loss, of a language model."""
        return None if self.tokens is None else perplexity(self.loss)


@dataclass(frozen=True)
class Evaluation:
    """What was measured on the same data."""

    task: TaskName
    data: tuple[str, ...]
    example: str
    """What the data were cut into: blocks of tokens, examples, texts, images."""
    unit: str
    """What losses are in: nats per token, per text, ..."""
    measured: tuple[Measured, ...]

    def as_json(self) -> dict[str, Any]:
        """For JSON, without what the task has not."""
        left_out = {"accuracy"} if self.task == "text-generation" else {"perplexity", "tokens"}
        rows = ({**dataclasses.asdict(one), "perplexity": one.perplexity} for one in self.measured)
        measured = [{key: value for key, value in row.items() if key not in left_out} for row in rows]
        return {**dataclasses.asdict(self), "measured": measured}


def evaluate(
    adapters: Sequence[str],
    data: Sequence[str],
    base: str | None = None,
    measuring: Measuring | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Measure adapters, and with those of language models their base.

    Args:
        adapters: their folders; a single one, or any of classifiers, may hold a whole model; none: the base alone.
        data: files, folders and data sets, as ``doratune train`` takes them.
        base: base model; None: the one that the adapters name.
        measuring: how; None: as in training.
        console: where progress is shown; None: nothing is shown.

    Raises:
        AdapterError: listing what is wrong with folders, options or data before a model is loaded; later, if a model
            cannot be loaded, or memory is short.
    """
    require("transformers")
    measuring = measuring or Measuring()
    task = _task(adapters, data, base, measuring)
    choose_dtype(measuring.dtype)
    with tempfile.TemporaryDirectory() as folder, explaining_memory("try a smaller batch_size, or dtype bfloat16"):
        run = _Run(tuple(data), base, measuring, console or Console(quiet=True), Path(folder))
        return run.classifiers(task, adapters) if task in CLASSIFIERS else run.language_models(adapters)


def _task(adapters: Sequence[str], data: Sequence[str], base: str | None, measuring: Measuring) -> TaskName:
    """The task of all adapters.

    Raises:
        AdapterError: listing everything that can be found wrong without reading data or a model.
    """
    tasks: dict[str, Any] = {}
    problems = []
    for folder in adapters:
        try:
            tasks[folder] = task_of_folder(Path(folder), base)
        except AdapterError as error:
            problems += error.problems
    if not adapters and base is None:
        problems.append("name an adapter's folder, or a model with --base")
    elif not adapters and (about := Information.load(base or "")) and about.task in CLASSIFIERS:
        problems.append(f"{base} was trained for {about.task}, where no base is measured; name it without --base")
    if len(set(tasks.values())) > 1:
        listed = ", ".join(f"{folder} for {task}" for folder, task in tasks.items())
        problems.append(f"trained for different tasks ({listed}); measure them apart")
    task: TaskName | None = None if problems else next(iter(tasks.values()), "text-generation")
    problems += measuring.problems(task)
    if not data:
        problems.append("data: name at least one file, folder or data set of the hub")
    if task:
        problems += task_of(task).problems(TrainConfig(base or "", tuple(data)))
    else:  # what may be data depends on it
        absent = (name for name in data if not path_of(name).exists() and not is_hub_name(name))
        problems += [f"data {name}: no such file" for name in absent]
    if task is None or problems:
        raise AdapterError.of("cannot be measured", problems)
    return task


@dataclass
class _Run:
    """One evaluation; what it raises is what ``evaluate`` does."""

    data: tuple[str, ...]
    base: str | None
    measuring: Measuring
    console: Console
    output: Path
    """An empty folder, which the Trainer wants to have."""
    said: set[str] = field(default_factory=set)

    def language_models(self, adapters: Sequence[str]) -> Evaluation:
        """Measure the base and each adapter on the same tokens, or a whole model."""
        sources = find_sources(adapters, self.base)
        folders = sources.adapters or {folder_name(Path(adapters[0])) if adapters else BASE: Path(sources.base)}
        noted = sources.noted()
        config = self.config("text-generation", sources.base, noted)
        with loading_base(sources.base, sources.named):
            tokenizer = load_tokenizer(tokenizer_source(sources.adapters.values(), sources.base))
            prepared = text.to_measure(config, tokenizer, self.say)
        with self.loading(sources.base):
            writer = Writer.load(sources, _dtype(config), quantize=config.quantize)
        if isinstance(prepared.collate, Packed):
            refuse_leaks(writer.model, sources.base)
        trainer = self.trainer(config, writer.model, prepared)
        measured = []
        for name in [BASE, *folders] if sources.adapters else folders:
            with writer.using(name if name in sources.adapters else None):
                folder = None if name == BASE else str(folders[name])
                measured.append(self.measure(trainer, name, folder, sources.base))
        whole = config.loss_on == "all" or "text" in prepared.columns
        unit = "nats per token" if whole else "nats per token of the completions"
        return Evaluation("text-generation", self.data, prepared.example, unit, tuple(measured))

    def classifiers(self, task: TaskName, adapters: Sequence[str]) -> Evaluation:
        """Measure one after the other, each with its own classes; the data are read for all before one is loaded."""
        ready: dict[str, tuple[Classifier, TrainConfig, Prepared]] = {}
        for adapter in adapters:
            found = Classifier.find(Path(adapter), self.base)
            name = folder_name(found.folder, ready)
            config = self.config(task, found.base, {name: found.about})
            more = [found.about.forward] if found.takes_images else []
            with loading_base(found.base, found.named):
                given = (config, found.load_processor(), found.labels, *more, self.say)
                prepared = task_of(task).to_measure(*given)
            ready[name] = found, config, prepared
        measured = tuple(self.classifier(name, *parts) for name, parts in ready.items())
        example = prepared.example
        return Evaluation(task, self.data, example, f"nats per {example.removesuffix('s')}", measured)

    def classifier(self, name: str, found: Classifier, config: TrainConfig, prepared: Prepared) -> Measured:
        """Load and measure one; nothing of it is kept while the next is loaded."""
        with self.loading(found.base):
            predictor = Predictor.load(found, _dtype(config), config.quantize)
        return self.measure(self.trainer(config, predictor.model, prepared), name, str(found.folder), found.base)

    def config(self, task: TaskName, base: str, noted: Mapping[str, Information]) -> TrainConfig:
        """The options of a run that would measure so; how it would load the base is said."""
        if told := self.measuring.loading(noted).told:
            self.say(told)
        return self.measuring.config(task, base, self.data, noted)

    def say(self, line: str) -> None:
        """Print a line, once where it is the same of every classifier."""
        if line not in self.said:
            self.console.out(line, highlight=False)
        self.said.add(line)

    def loading(self, base: str) -> Any:
        """Within this context it is shown that a model is loaded."""
        return self.console.status(Text(f"Loading {base}"))

    def trainer(self, config: TrainConfig, model: Any, prepared: Prepared) -> Any:
        """What a run measures with, but for the training."""
        config = dataclasses.replace(config, output=self.output)
        dtype = choose_dtype(config.dtype, not config.is_adapter)
        if getattr(model, "is_quantized", False):
            model._hf_peft_config_loaded = True  # Trainer refuses quantised models without adapters, also to measure
        return make_trainer(config, model, prepared, dtype, autocast(config, dtype))

    def measure(self, trainer: Any, name: str, folder: str | None, base: str) -> Measured:
        """Measure the model as it is now, with a bar."""
        from doratune.train.callbacks import AfterBatch

        with Progress(console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            batches = bar.add_task(f"Measuring {name}", total=len(trainer.get_eval_dataloader()))
            advance = AfterBatch(lambda: bar.advance(batches))
            trainer.add_callback(advance)
            found = trainer.evaluate()
            trainer.remove_callback(advance)
        loss, accuracy = found["eval_loss"], found.get("eval_accuracy")
        return Measured(name, folder, base, loss, len(trainer.eval_dataset), getattr(trainer, "tokens", None), accuracy)


def _dtype(config: TrainConfig) -> str:
    """The name of the dtype that a run would choose."""
    return str(choose_dtype(config.dtype, not config.is_adapter)).removeprefix("torch.")
