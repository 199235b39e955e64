"""Image classification: a new head on a vision transformer, trained with the adapter."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from doratune.errors import AdapterError
from doratune.extras import require
from doratune.train import images, sources
from doratune.train.augmentation import augmented
from doratune.train.columns import described
from doratune.train.config import TrainConfig
from doratune.train.gather import BadRow, Say, gather
from doratune.train.images import Picture, picture, pictures
from doratune.train.labels import refuse_unknown
from doratune.train.models import choose_dtype, image_classifier, load_config, load_image_processor
from doratune.train.sources import Row
from doratune.train.tasks.division import divided
from doratune.train.tasks.prepared import Prepared

OPENED = 20_000
"""Up to so many images are opened before training, to find those that cannot be read; of more the beginning is, unless
bad ones are to be left out."""


def problems(config: TrainConfig) -> Iterator[str]:
    """What is wrong with the sources, found before anything is loaded."""
    return sources.problems(config, images.problem_of)


def prepare(config: TrainConfig, say: Say) -> Prepared:
    """Find, check and split.

    Raises:
        AdapterError: listing every image that cannot be used, or if there are fewer than two classes.
    """
    processor = load_image_processor(config.model, config.image_size)
    size = processed_size(processor)
    found, columns = _gathered(config.data, config, config.split, "train", say)
    if columns:
        say(f"columns: {described(columns, config)}")
    eval_data = config.eval_data
    if not eval_data and all(images.has_test_part(name) for name in config.data):
        say("the archive brings its own images to measure on")
        eval_data = config.data
    own, own_test = (
        _gathered(names, config, split, "test", say)[0] if names else None
        for names, split in ((eval_data, config.eval_split), (config.test_data, config.test_split))
    )
    names, found, others, test = divided(found, own, own_test, config, say)
    forward = _forward_options(config, size)
    told = f", {len(test)} to test on" if test else ""
    say(
        f"{len(found)} images in {len(names)} classes to train on, {len(others)} held out{told}; "
        f"{size[0]} x {size[1]} pixels" + (", position embeddings interpolated" if forward else "")
    )
    return Prepared(
        Images(found, names, processor, config.augment, config.seed),
        Images(others, names, processor),
        collate=functools.partial(_collate, forward, choose_dtype(config.dtype, not config.is_adapter)),
        processor=processor,
        unit="images",
        example="images",
        labels=names,
        columns=columns,
        image_size=size,
        forward=forward,
        test=Images(test, names, processor) if test else None,
    )


def to_measure(
    config: TrainConfig, processor: Any, labels: tuple[str, ...], forward: Mapping[str, Any], say: Say
) -> Prepared:
    """Find ``data``, and prepare them as a run prepares its held-out data.

    Args:
        config: the options.
        processor: turns images into the model's input.
        labels: names of the classes, in the order of the logits.
        forward: further arguments of the model's forward.
        say: told what is found.

    Raises:
        AdapterError: listing every image that cannot be used, or classes that are not among the labels.
    """
    found, columns = _gathered(config.data, config, config.split, "test", say)
    if columns:
        say(f"columns: {described(columns, config)}")
    refuse_unknown({one.label or "" for one in found}, labels, "data")
    return Prepared(
        None,
        Images(found, labels, processor),
        collate=functools.partial(_collate, forward, choose_dtype(config.dtype, not config.is_adapter)),
        processor=processor,
        unit="images",
        example="images",
        labels=labels,
        columns=columns,
    )


class Images(Dataset[dict[str, Any]]):
    """Pixels and class of each image, opened when asked for."""

    def __init__(
        self,
        found: Sequence[Picture],
        names: tuple[str, ...],
        processor: Any,
        augment: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.found, self.processor, self.augment, self.seed = found, processor, augment, seed
        self.classes = [names.index(one.label or "") for one in found]
        self.epoch = 0
        """Set by the run at the beginning of each: images are changed anew."""

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: int) -> dict[str, Any]:
        one = self.found[index]
        try:
            image = one.open()
        except BadRow as error:
            there = not isinstance(one.source, Path) or one.source.is_file()
            hint = f"of more than {OPENED:,} images only the beginnings are checked; --skip-bad checks them whole first"
            told = hint if there else "it was there when the run began"
            raise AdapterError(f"{one.where}: {error}; {told}") from error
        if self.augment:
            image = augmented(image, self.augment, self.seed, self.epoch, index)
        pixels = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": self.classes[index]}


def _collate(forward: Mapping[str, Any], dtype: torch.dtype, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch, in the base's dtype: some models, such as Swin, do not cast what they are given."""
    pixels = torch.stack([row["pixel_values"] for row in rows]).to(dtype)
    return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows]), **forward}


def processed_size(processor: Any) -> tuple[int, int]:
    """Height and width of what an image processor gives."""
    image = require("PIL.Image").new("RGB", (64, 48))
    return tuple(processor(image, return_tensors="pt")["pixel_values"].shape[-2:])


def _gathered(
    names: Sequence[str], config: TrainConfig, split: str, part: str, say: Say
) -> tuple[list[Picture], dict[str, str]]:
    """The images of all sources, and the columns they come from."""
    rows: list[Row] = []
    columns: dict[str, str] = {}
    for name in names:
        found, own = pictures(name, config, split, part, say=say)
        rows += found
        columns.update(own)
    if not rows:
        raise AdapterError(f"{', '.join(names)}: no images ({', '.join(images.SUFFIXES)})")
    thorough = len(rows) <= OPENED or config.skip_bad  # what is left out has to be known before training
    if not thorough:
        say(f"{len(rows)} images: the beginning of each is checked, the rest when it is opened")
    with ThreadPoolExecutor() as pool:  # decoding runs outside of Python's lock
        looked_at = pool.map(functools.partial(checked, thorough=thorough), rows)
        return gather(_counted(looked_at, len(rows), say), picture, config, say), columns


def _counted(rows: Iterator[Row], count: int, say: Say) -> Iterator[Row]:
    """Rows as they come; how far it is is said where there are many."""
    for number, row in enumerate(rows, 1):
        yield row
        if number % OPENED == 0:
            say(f"{number} of {count} images checked")


def checked(row: Row, thorough: bool = True) -> Row:
    """A row, or what is wrong with its image: opened if thorough, else only looked at."""
    if row.problem:
        return row
    image, source = require("PIL.Image"), row.values["image"]
    try:
        if isinstance(source, Path) and not source.is_file():
            raise BadRow(f"no such image {source}")
        if thorough:
            Picture(row.where, source, None).open()
        elif isinstance(source, Path):
            image.open(source).close()
    except BadRow as error:
        return Row(row.where, problem=str(error))
    except (OSError, image.DecompressionBombError) as error:
        return Row(row.where, problem=f"image cannot be read: {error}")
    return row


def _forward_options(config: TrainConfig, size: tuple[int, int]) -> dict[str, Any]:
    """``interpolate_pos_encoding`` where the model was pretrained at another size and does not do it by itself."""
    own = load_config(config.model)
    pretrained = getattr(own, "image_size", None)
    pretrained = (pretrained, pretrained) if isinstance(pretrained, int) else tuple(pretrained or size)
    kind = image_classifier(own)
    if kind is None:
        raise AdapterError(f"model {config.model}: transformers has no image classifier for {type(own).__name__}")
    patch = own.patch_size
    if min(size) < (patch if isinstance(patch, int) else max(patch)):
        raise AdapterError(
            f"images of {size[0]} x {size[1]} pixels do not fill a patch of the model, which has {patch}"
        )
    takes = "interpolate_pos_encoding" in inspect.signature(kind.forward).parameters
    if pretrained == size or not takes:
        return {}
    return {"interpolate_pos_encoding": True}
