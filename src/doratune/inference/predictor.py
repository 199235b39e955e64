"""Texts and images classified, by a base model with an adapter or by a whole model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from doratune.checkpoint import load_adapter
from doratune.errors import AdapterError
from doratune.extras import require
from doratune.files import read_config
from doratune.inference.inputs import Input
from doratune.inference.loading import Loading
from doratune.inference.sources import NAMED, base_of, guessed_task, loading_base, tokenizer_source
from doratune.targets import HEAD_NAMES
from doratune.train.device import explaining_memory, to_device
from doratune.train.information import Information
from doratune.train.model_names import is_model, model_problem
from doratune.train.models import (
    CLASSIFIERS,
    PREPROCESSOR,
    align_padding,
    context_length,
    load_base,
    load_classifier,
    load_config,
    load_image_processor,
    load_tokenizer,
    peft_task,
    saved_classes,
)
from doratune.train.optimizer import keep_float32
from doratune.train.positions import rows_of_table
from doratune.train.tokens import cut_texts
from doratune.weight_files import header, read_tensor, weight_files


@dataclass(frozen=True)
class Prediction:
    """What the model takes one text or image for."""

    input: Input
    label: str
    """The likeliest class."""
    probabilities: tuple[float, ...]
    """Of each class, in the order of the model's labels; their sum is 1."""

    @property
    def probability(self) -> float:
        """Of the likeliest class."""
        return max(self.probabilities)


@dataclass(frozen=True)
class Classifier:
    """A folder that classifies: of an adapter, or of a whole model."""

    folder: Path
    base: str
    """Where the base model is; of a whole model its own folder."""
    about: Information
    named: bool = False
    """Whether the adapter names the base, as none was given."""

    @classmethod
    def find(cls, folder: Path, base: str | None = None) -> Classifier:
        """Look at a folder without loading a model.

        Args:
            folder: of the adapter or model; without ``doratune.json`` the config of the model tells the task.
            base: base model of an adapter; None: the one that the folder names.

        Raises:
            AdapterError: if the folder holds no classifier that can be used, or the base is not known.
        """
        whole = is_model(folder)
        if whole and base is not None:
            raise AdapterError(f"{folder} is a whole model, which needs no --base")
        named = not whole and base is None
        name = str(folder) if whole else base_of(folder, base, or_model=True)
        about = Information.load(folder)
        if problem := model_problem(name):
            raise AdapterError(f"{problem} ({NAMED})" if named else problem)
        if about is None:
            with loading_base(name, named):
                about = Information(guessed_task(name, None if whole else peft_task(read_config(folder))), name, "")
        if about.task not in CLASSIFIERS:
            raise AdapterError(f"{folder} was trained for {about.task}; use doratune generate {folder}")
        return cls(folder, name, about, named)

    @property
    def takes_images(self) -> bool:
        """Whether it classifies images, not texts."""
        return self.about.task == "image-classification"

    def loading(self, dtype: str = "auto", quantize: str | None = "auto") -> Loading:
        """How the base is loaded, as in ``Loading.choose``."""
        return Loading.choose({str(self.folder): self.about}, dtype, quantize)

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        known = self.about.labels
        if not known and not is_model(self.folder) and peft_task(read_config(self.folder)) in CLASSIFIERS:
            known = tuple(saved_classes(self.folder, self.base))
        return known or tuple(str(label) for _, label in sorted((load_config(self.base).id2label or {}).items()))

    def load_processor(self) -> Any:
        """Load the tokenizer or image processor.

        Raises:
            AdapterError: if it cannot be loaded.
        """
        if not self.takes_images:
            return load_tokenizer(tokenizer_source([self.folder], self.base))
        if (self.folder / PREPROCESSOR).is_file():
            return require("transformers").AutoImageProcessor.from_pretrained(self.folder)
        size = self.about.image_size
        return load_image_processor(self.base, size[0] if size else None)


class Predictor:
    """A classifier with what turns texts or images into its input.

    Args:
        model: a transformers model with a classification head, adapter included.
        processor: its tokenizer or image processor.
        labels: names of the classes, in the order of the logits.
        max_length: tokens at which texts are cut.
        forward: further arguments of the model's forward.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        labels: Sequence[str],
        max_length: int | None = None,
        forward: dict[str, Any] | None = None,
    ) -> None:
        self.model = model.eval()
        self.processor = processor
        self.labels = tuple(labels)
        self.max_length = max_length
        self.forward = forward or {}
        self.cut = 0
        """Texts that were longer than max_length, so far."""
        if max_length is not None:
            align_padding(model, processor)

    @classmethod
    def load(cls, found: Classifier, dtype: str = "auto", quantize: str | None = "auto") -> Predictor:
        """Load base model, adapter, and tokenizer or image processor.

        Args:
            found: where they are.
            dtype: of the base weights; "auto": as in training, else as ``doratune train`` chooses it.
            quantize: load the base in 4 or 8 bits, a kind of ``doratune train``; "auto": as in training; None: in full
                precision.

        Raises:
            AdapterError: if something cannot be loaded, or the model is no classifier.
        """
        about, folder = found.about, found.folder
        whole = is_model(folder)
        weights, options = found.loading(dtype, quantize).options(classifier=True)
        with loading_base(found.base, found.named):
            if about.labels and not whole:  # as in training, where what is new is known
                model, heads = load_classifier(found.base, weights, about.task, about.labels, options)
            else:
                model = load_base(folder, found.base, weights, options)
                heads = [name for name, _ in model.named_children() if name in HEAD_NAMES]
        if about.method != "full":
            keep_float32(model, heads)
        if whole and about.method == "head":
            _restore_float32(model, folder, heads)
        model = to_device(model)
        if not whole:
            load_adapter(model, folder)
        labels = found.labels
        kind = type(model).__name__
        if "Classification" not in kind or len(labels) < 2:
            raise AdapterError(f"{found.base} is a {kind} with {len(labels)} labels, not a classifier")
        problem = getattr(model.config, "problem_type", None)
        if problem not in (None, "single_label_classification"):
            raise AdapterError(f"{found.base} was trained for {problem}, and not to name the one class of each input")
        processor = found.load_processor()
        if found.takes_images:
            return cls(model, processor, labels, forward=dict(about.forward))
        most = [about.max_length] if about.max_length else [processor.model_max_length, context_length(model.config)]
        most.append(rows_of_table(model))  # a run's max_length may be larger, if its texts were short
        return cls(model, processor, labels, min(filter(None, most)))

    def predict(self, inputs: Sequence[Input]) -> list[Prediction]:
        """Classify texts or images, all in one batch.

        Raises:
            AdapterError: if memory is short, an image has gone, or what the model gives is no number.
        """
        with torch.no_grad(), explaining_memory("try a smaller batch_size"):
            batch = self._pixels(inputs) if self.max_length is None else self._tokens(inputs, self.max_length)
            logits = self.model(**batch, **self.forward).logits
        rows = logits.float().softmax(-1).cpu()
        broken = [one.where for one, row in zip(inputs, rows, strict=True) if not row.isfinite().all()]
        if broken:
            raise AdapterError(f"the model gives NaN for {len(broken)} of {len(inputs)} inputs, such as {broken[0]}")
        return [
            Prediction(one, self.labels[int(row.argmax())], tuple(row.tolist()))
            for one, row in zip(inputs, rows, strict=True)
        ]

    def _tokens(self, inputs: Sequence[Input], length: int) -> dict[str, torch.Tensor]:
        ids, longer = cut_texts([one.source for one in inputs], self.processor, length)
        self.cut += longer
        return dict(self.processor.pad({"input_ids": ids}, return_tensors="pt", verbose=False).to(self.model.device))

    def _pixels(self, inputs: Sequence[Input]) -> dict[str, torch.Tensor]:
        found = [self.processor(_open(one), return_tensors="pt")["pixel_values"][0] for one in inputs]
        return {"pixel_values": torch.stack(found).to(self.model.device, self.model.dtype)}


def _restore_float32(model: Any, folder: Path, heads: Sequence[str]) -> None:
    """Give a model of method head what it trained in float32, beside a base in 16 bits: loading has rounded it."""
    kinds = {key: (kind, file) for file in weight_files(folder) for key, (kind, _) in header(file).items()}
    beside = any(kind in ("BF16", "F16") for kind, _ in kinds.values())
    for key, (kind, file) in kinds.items():
        path = key.rpartition(".")[0]
        if kind == "F32" and (beside or path.split(".")[0] in heads):
            keep_float32(model, [path])
            model.get_parameter(key).data = read_tensor(file, key).clone()


def _open(one: Any) -> Any:
    try:
        return one.open()
    except ValueError as error:
        raise AdapterError(f"{one.where}: {error}; it was there a moment ago") from error
