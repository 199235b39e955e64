"""Training that goes on from an adapter: what its file decides, what the run decides, and what does not go together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from doratune.checkpoint import attach_filled, config_of, read_adapter
from doratune.config import AdapterConfig
from doratune.contents import KEY, PREFIX
from doratune.errors import AdapterError
from doratune.files import CONFIG, read_config, reading_adapter, weights_file
from doratune.hub import adapter_folder
from doratune.own_options import with_own_options
from doratune.peft_config import from_peft
from doratune.targets import plain_path, unwrap
from doratune.train.checkpoints import find_last
from doratune.train.config import ADAPTER_OPTIONS, TrainConfig, comparable
from doratune.train.gather import Say
from doratune.train.information import Information
from doratune.train.model_names import base_name, place_of
from doratune.train.models import SAVED_HEAD
from doratune.train.output import CHECKPOINTS
from doratune.train.without_effect import DECIDED, LOW_RANK
from doratune.weight_files import header, read_metadata

OF_THE_RUN = tuple(name for name in ADAPTER_OPTIONS if name not in DECIDED)
"""Options of the adapter that say how it is trained. They are the run's, as learning rates are."""
LOST = {
    ("dora", "lora"): "its magnitudes would be lost",
    ("dora", "magnitude"): "its A and B would not be trained",
    ("lora", "magnitude"): "its A and B would not be trained",
    ("magnitude", "dora"): "it has no A and B to train",
    ("magnitude", "lora"): "it has no A and B to train",
}
"""Why a file of one method cannot be trained by another."""


@dataclass(frozen=True)
class Start:
    """The adapter of a folder, as far as its files tell without the model."""

    folder: Path
    method: str
    """dora, lora or magnitude."""
    config: AdapterConfig
    layers: int
    classes: int | None
    """Rows of the head that lies with it."""
    about: Information | None

    @property
    def vain(self) -> tuple[str, ...]:
        """Options of an adapter that have no effect."""
        return (*LOW_RANK, "norm_gradient") if self.method == "magnitude" else ()

    @property
    def decided(self) -> dict[str, Any]:
        """Options of the adapter that are those of the file."""
        return {name: getattr(self.config, name) for name in DECIDED if name not in self.vain}

    @classmethod
    def read(cls, name: str) -> Start:
        """Look at a folder.

        Raises:
            AdapterError: if it holds no adapter that can be used.
        """
        folder = adapter_folder(name)
        with reading_adapter(folder):
            raw = read_config(folder)
        options = from_peft(raw, str(folder / CONFIG))
        file = weights_file(folder)
        shapes = {key: shape for key, (_, shape) in header(file).items()}
        found = (KEY.fullmatch(plain_path(key.removeprefix(PREFIX))) for key in shapes)
        paths = {match["path"] for match in found if match}
        if not paths:
            raise AdapterError(f"{file} holds no adapter")
        try:
            own = with_own_options(options.config, read_metadata(file))
        except AdapterError as error:
            raise AdapterError(f"{file}: {error}") from error
        if options.layers_to_transform is not None:
            own = dataclasses.replace(own, targets=tuple(sorted(paths)))
        heads = [shape[0] for key, shape in shapes.items() if SAVED_HEAD.search(key)]
        method = "magnitude" if all(own.rank_of(path) == 0 for path in paths) else own.method
        return cls(folder, method, own, len(paths), heads[0] if heads else None, Information.load(folder))


def problems(config: TrainConfig) -> Iterator[str]:
    """What is wrong with it, found before anything is loaded."""
    if config.start_from is None:
        return
    if not config.is_adapter:
        yield f"start_from: method {config.method} trains no adapter; use dora, lora or magnitude, or leave it out"
        return
    try:
        start = Start.read(config.start_from)
    except AdapterError as error:
        listed = error.problems != [str(error)]  # they do not name the file then
        where = f"start_from {config.start_from}" if listed else "start_from"
        yield from (f"{where}: {line}{_without(config)}" for line in error.problems)
        return
    if why := LOST.get((start.method, config.method)):
        allowed = "dora or lora" if start.method == "lora" else start.method
        what = f"start_from: {start.folder} is a {start.method} adapter"
        yield f"{what}, which method {config.method} cannot go on with: {why}; use method {allowed}"
    about = start.about
    has_head = start.classes is not None or (about and about.labels)
    if has_head and (config.task == "text-generation" or (about and about.task != config.task)):
        task = about.task if about else "classification"
        yield f"start_from: {start.folder} is for {task}, and has its head; the task here is {config.task}"


def _without(config: TrainConfig) -> str:
    """How a run is resumed whose beginning is gone."""
    last, _ = find_last(config.output / CHECKPOINTS) if config.resume else (None, [])
    return f" (to go on without it, and measure what is before at the checkpoint: --start-from {last})" if last else ""


def decided(config: TrainConfig) -> dict[str, Any]:
    """Options of the adapter that are those of the file, and what they are there.

    Raises:
        AdapterError: if the folder holds no adapter that can be used.
    """
    if config.start_from is None or not config.is_adapter:
        return {}
    return Start.read(config.start_from).decided


def overruled(config: TrainConfig) -> list[str]:
    """Options that were given and are not those of the file, which decides them."""
    if config.start_from is None:
        return []
    start = Start.read(config.start_from)
    plain = AdapterConfig()
    lines = []
    for name, own in start.decided.items():
        given = getattr(config.adapter, name)
        if comparable(given) not in (comparable(getattr(plain, name)), comparable(own)):
            lines.append(f"{name} is {_told(own)} as in {start.folder}, not {_told(given)}")
    return lines


def _told(value: Any) -> str:
    return ", ".join(value) or "none" if isinstance(value, list | tuple) else str(value)


def resolved(config: TrainConfig) -> TrainConfig:
    """The options of a run, those of the adapter as its file has them.

    Raises:
        AdapterError: if the folder holds no adapter that can be used.
    """
    own = decided(config)
    return dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, **own)) if own else config


def described(config: TrainConfig) -> Iterator[str]:
    """What training begins with, in words, and what is other than one might think."""
    if config.start_from is None:
        return
    start = Start.read(config.start_from)
    own = start.config
    sizes = "" if start.method == "magnitude" else f" of rank {own.rank} and alpha {own.alpha:g}"
    turned = ""
    if start.method != config.method:
        turned = "; made DoRA, with magnitudes that change nothing at first (--method lora goes on with LoRA)"
    yield f"start_from {start.folder}: {start.method}{sizes} on {start.layers} layers{turned}"
    base = base_name(start.folder)
    if base and place_of(base) != place_of(config.model):
        yield f"{start.folder} was trained on {base}, here the base is {config.model}"
    if start.about and start.about.quantize != config.quantize:
        was, now = start.about.quantize or "none", config.quantize or "none"
        yield f"{start.folder} was trained with --quantize {was}, here it is {now}: the weights differ a little"
    if start.about and start.about.task != config.task:
        yield f"{start.folder} was trained for {start.about.task}: the head is new"
    for name in OF_THE_RUN:
        was, now = getattr(own, name), getattr(config.adapter, name)
        was_used = name not in start.vain and (name == "dropout" or start.method != "lora")
        if was_used and comparable(was) != comparable(now):
            yield f"{name} is {_told(now)} in this run, was {_told(was)} in {start.folder}"
    yield from overruled(config)


def classes(config: TrainConfig, found: tuple[str, ...], say: Say) -> tuple[str, ...]:
    """Names of the classes in the order of the logits: as found in the data, or those of the adapter to begin with.

    Raises:
        AdapterError: if the data have classes that its head lacks.
    """
    if config.start_from is None:
        return found
    start = Start.read(config.start_from)
    names = start.about.labels if start.about else ()
    if names and set(found) <= set(names):
        return names
    advice = "train on its classes, or without start_from"
    if names:
        raise AdapterError(
            f"start_from: {start.folder} has the classes {', '.join(names)}; the data have {', '.join(found)}; {advice}"
        )
    if start.classes is None:
        return found
    if start.classes != len(found):
        raise AdapterError(
            f"start_from: {start.folder} has a head of {start.classes} classes; the data have {len(found)}: "
            f"{', '.join(found)}; {advice}"
        )
    say(f"{start.folder} does not name its classes, which are taken to be, in this order: {', '.join(found)}")
    return found


def attach_start(model: nn.Module, config: TrainConfig, head: list[str]) -> None:
    """Attach the adapter that training begins with, and what is to be trained whole besides.

    Raises:
        AdapterError: if it does not fit the model.
    """
    assert config.start_from is not None
    root = unwrap(model)
    contents = read_adapter(root, adapter_folder(config.start_from))
    given = config.adapter_config()
    assert given is not None
    own = config_of(root, contents)
    # An adapter may be on the base's own head, or inside it.
    new = [path for path in head if not any(f"{layer}.".startswith(f"{path}.") for layer in contents.layers)]
    whole = tuple(dict.fromkeys([*own.modules_to_save, *new]))
    ours = {name: getattr(given, name) for name in ("method", *OF_THE_RUN)}
    adapter = dataclasses.replace(own, modules_to_save=whole, **ours)
    attach_filled(root, contents, adapter, "default", trainable=True)
