"""Which folders are meant: adapters with names to switch by, and the one base model under them."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from doratune.errors import AdapterError
from doratune.files import read_config, read_weights, reading_adapter
from doratune.train.information import Information
from doratune.train.model_names import NAMELESS, base_name, is_model, model_problem, place_of
from doratune.train.models import CLASSIFIERS, load_config, peft_task

TOKENIZER_CONFIG = "tokenizer_config.json"
BASE = "base"
"""What the model without any adapter is called."""
NAMED = "named by the adapter; another place can be given with --base"
"""Said of a base model that cannot be loaded, unless it was given."""


@dataclass(frozen=True)
class Sources:
    """A base model, a folder or hub name, and adapters on it by name."""

    base: str
    adapters: dict[str, Path]
    named: bool = False
    """Whether the adapters name the base, as none was given."""

    def noted(self) -> dict[str, Information]:
        """What was noted in training, where it was: of the adapters, or of a whole model."""
        folders = self.adapters or {BASE: Path(self.base).expanduser()}
        return {name: about for name, folder in folders.items() if (about := Information.load(folder))}


def find_sources(folders: Sequence[str], base: str | None = None) -> Sources:
    """Look at the folders without loading a model.

    Args:
        folders: of adapters; or a single folder of a whole model, to be used as it is.
        base: base model; None: the one that the adapters name.

    Raises:
        AdapterError: listing every folder that holds no usable adapter; if no base model is known, or several are.
    """
    if base is None and len(folders) == 1 and is_model(Path(folders[0])):
        _refuse_classifier(Path(folders[0]))
        return Sources(folders[0], {})
    problems: list[str] = []
    adapters: dict[str, Path] = {}
    named: dict[str, str] = {}
    for folder in map(Path, folders):
        try:
            with reading_adapter(folder, or_model=True):
                found = base_name(folder, base)
                read_weights(folder)  # a broken file is found before a large model is loaded
                _refuse_classifier(folder)
        except AdapterError as error:
            problems.append(str(error))
            continue
        name = folder_name(folder, adapters)
        adapters[name] = folder
        if found is None:
            problems.append(NAMELESS.format(folder))
        else:
            named[name] = found
    if base is None and not folders:
        problems.append("name an adapter's folder, or a model with --base")
    if len({place_of(model) for model in named.values()}) > 1:
        listed = ", ".join(f"{name} of {model}" for name, model in named.items())
        problems.append(f"the adapters name different base models ({listed}); give the one to use with --base")
    chosen = base or next(iter(named.values()), "")
    problem = model_problem(chosen) if chosen else None
    if problem:
        problems.append(problem if base else f"{problem} ({NAMED})")
    if problems:
        raise AdapterError.of("cannot be used", problems)
    return Sources(chosen, adapters, named=base is None)


def base_of(adapter: Path, given: str | None, or_model: bool = False) -> str:
    """The base model of an adapter; that the adapter can be read is found before a large model is loaded.

    Args:
        adapter: its folder.
        given: base model; None: the one that the folder names.
        or_model: whether a whole model's folder would have done as well, as in ``reading_adapter``.

    Raises:
        AdapterError: if the adapter is broken, or names no base where none is given.
    """
    with reading_adapter(adapter, or_model):
        base = base_name(adapter, given)
    read_weights(adapter)
    if base is None:
        raise AdapterError(NAMELESS.format(adapter))
    return base


@contextlib.contextmanager
def loading_base(base: str, named: bool) -> Iterator[None]:
    """An error about a base model that an adapter names, and that cannot be loaded, says how to name another place."""
    try:
        yield
    except AdapterError as error:
        if named and (model_problem(base) or f" {base} could not be loaded" in str(error)):
            raise AdapterError(f"{error} ({NAMED})") from error
        raise


def task_of_folder(folder: Path, base: str | None) -> str:
    """The task that an adapter or a whole model was trained for, found without loading a model.

    Raises:
        AdapterError: if the folder holds neither, or the base model is not known.
    """
    if about := Information.load(folder):
        return about.task
    if is_model(folder):
        return guessed_task(str(folder))
    with reading_adapter(folder, or_model=True):
        name = base_name(folder, base)
    if name is None:
        raise AdapterError(NAMELESS.format(folder))
    with loading_base(name, base is None):
        return guessed_task(name, peft_task(read_config(folder)))


def guessed_task(model: str, noted: str | None = None) -> str:
    """The task of what was not made by doratune, from PEFT's task type and the model's config.

    Raises:
        AdapterError: if the config cannot be loaded.
    """
    if noted == "CAUSAL_LM":
        return "text-generation"
    config = load_config(model)
    if hasattr(config, "patch_size") and hasattr(config, "num_channels"):
        return "image-classification"
    causal = not noted and any("CausalLM" in kind for kind in config.architectures or ())
    return "text-generation" if causal else "text-classification"


def tokenizer_source(folders: Iterable[Path], base: str) -> str:
    """Where the tokenizer is: with the adapter if that is a single one that brings its own, else with the base model.

    TRL, Axolotl and Unsloth write one beside the adapter, and so do our checkpoints: it may hold the chat template that
    the adapter was trained with, which the base lacks.
    """
    listed = list(folders)
    own = [folder for folder in listed if (folder / TOKENIZER_CONFIG).is_file()]
    return str(own[0]) if len(listed) == 1 and own else base


def _refuse_classifier(folder: Path) -> None:
    about = Information.load(folder)
    task = about.task if about else None if is_model(folder) else peft_task(read_config(folder))
    if task in CLASSIFIERS:
        raise AdapterError(f"{folder} was trained for {task}; use doratune predict {folder} FILES...")


def folder_name(folder: Path, taken: Collection[str] = ()) -> str:
    """The folder's name, or that of its run; a number is added where that is taken."""
    path = folder.resolve()
    own = path.parent.name if path.name in ("adapter", "model") else path.name
    if path.parent.name == "snapshots":  # the hub's cache: models--user--name/snapshots/revision
        own = path.parent.parent.name.rpartition("--")[2]
    name = re.sub(r"[^\w-]", "_", own) or "adapter"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(n for n in names if n not in taken and n != BASE)
