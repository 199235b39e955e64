"""Images from folders, tables, data sets and NumPy archives: found first, opened when they are needed."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from doratune.errors import AdapterError
from doratune.extras import require
from doratune.train.columns import choose
from doratune.train.config import TrainConfig
from doratune.train.gather import BadRow, Say, lacks
from doratune.train.labels import name_of
from doratune.train.sources import (
    PIPE,
    TABLES,
    Row,
    columns_of,
    is_dataset_folder,
    is_hub_name,
    path_of,
    read,
    without_rows,
)

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
KINDS = 5
"""Kinds of files passed over that are named, the most frequent ones."""
SPLITS = ("train", "test", "val", "valid", "validation")
KEYS = {
    "train": (("x_train", "y_train"), ("train_images", "train_labels"), ("images", "labels"), ("x", "y"), ("X", "y")),
    "test": (("x_test", "y_test"), ("test_images", "test_labels"), ("images", "labels"), ("x", "y"), ("X", "y")),
}
"""Names of arrays in NumPy archives: Keras', MedMNIST's and plain ones."""


@dataclass(frozen=True)
class Picture:
    """One image, not opened yet, and the name of its class."""

    where: str
    source: Any
    """A path, an array ([height, width] or [height, width, channels]), the bytes of a file, or a PIL image."""
    label: str | None

    def open(self) -> Image:
        """The image in RGB.

        Raises:
            BadRow: if it cannot be read.
        """
        image = require("PIL.Image")
        try:
            if isinstance(self.source, np.ndarray):
                return image.fromarray(_as_bytes(self.source)).convert("RGB")
            if isinstance(self.source, bytes):
                return _in_rgb(image.open(io.BytesIO(self.source)))
            if isinstance(self.source, Path):
                with image.open(self.source) as opened:
                    return _in_rgb(opened)
            return _in_rgb(self.source)
        except (OSError, ValueError, SyntaxError, TypeError, image.DecompressionBombError) as error:
            raise BadRow(f"image cannot be read: {error}") from error


def problem_of(name: str) -> str | None:
    """What is wrong with a source of images as far as one can see without reading it."""
    path = path_of(name)
    if not path.exists():
        return None if is_hub_name(name) else "no such file"
    if path.is_dir() and not is_dataset_folder(path):
        folders = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
        if not folders:
            tables = [child for child in sorted(path.iterdir()) if child.suffix.lower() in TABLES]
            instead = f"; if a table says the classes, name it: {tables[0]}" if tables else ""
            return f"has no subfolders; expected one for each class, with its images{instead}"
        if {folder.name.lower() for folder in folders} <= set(SPLITS):
            first = next((one for one in folders if one.name.lower() == "train"), folders[0])
            return f"has a subfolder for each split; name {first} as data, and another as eval_data or test_data"
    if not path.is_dir() and not path.is_file():
        return PIPE
    if path.is_file() and path.suffix.lower() not in (".npz", *TABLES):
        return f"is not a folder, an .npz archive or a table ({', '.join(TABLES)}) of images"
    return None


def pictures(
    name: str, config: TrainConfig, split: str, part: str, labelled: bool = True, say: Say | None = None
) -> tuple[Iterator[Row], dict[str, str]]:
    """Find the images of a source.

    Args:
        name: folder with a subfolder for each class, table with paths, ``.npz``, data set.
        config: says which columns.
        split: of a data set.
        part: "train" or "test": which arrays of a NumPy archive.
        labelled: whether every image must have a label; if not, an image file and any folder of images will do, and
            of a NumPy archive any arrays, those to measure on first.
        say: told of files in a folder that are passed over.

    Returns:
        Rows with ``image`` and ``label``, and the columns they come from.

    Raises:
        AdapterError: if the source as a whole cannot be read.
    """
    path = path_of(name)
    if path.is_file() and path.suffix.lower() == ".npz":
        return _archive(path, part, labelled), {}
    if path.is_file() and path.suffix.lower() in SUFFIXES and not labelled:
        return iter([Row(name, {"image": path, "label": None})]), {}
    if path.is_dir() and not is_dataset_folder(path):
        return (_folder(path, say) if labelled else _anywhere(path, say)), {}
    found, where = columns_of([name], split)
    if not found:
        raise without_rows([name], split)
    roles, optional = (["image", "label"], []) if labelled else (["image"], ["label"])
    columns = choose(config, found, roles, where, optional)
    return _table(name, split, columns, roles, path.parent if path.is_file() else None), columns


def picture(row: Row) -> Picture:
    """The image of a row that ``pictures`` found.

    Raises:
        BadRow: if the row has none, or no label.
    """
    label = row.values.get("label")
    return Picture(row.where, row.values["image"], name_of(label))


def has_test_part(name: str) -> bool:
    """Whether a source is an archive that brings its own images to measure on."""
    path = path_of(name)
    if not path.is_file() or path.suffix.lower() != ".npz":
        return False
    with _opened(path) as archive:
        keys = set(archive.files)
    return any(set(pair) <= keys for pair in KEYS["test"][:2]) and any(set(pair) <= keys for pair in KEYS["train"][:2])


def _folder(path: Path, say: Say | None) -> Iterator[Row]:
    """All images of the folders of classes; a class without any is a problem, what else there is is said."""
    children = sorted(child for child in path.iterdir() if not child.name.startswith("."))
    passed = [child for child in children if child.is_file()]
    for folder in filter(Path.is_dir, children):
        empty = True
        for file in _shown(folder):
            if file.suffix.lower() in SUFFIXES:
                empty = False
                yield Row(str(file), {"image": file, "label": folder.name})
            elif file.is_file():
                passed.append(file)
        if empty:
            yield Row(str(folder), problem=f"holds no image ({', '.join(SUFFIXES)})")
    _tell(path, passed, "lie in a folder for each class and end", say)


def _anywhere(path: Path, say: Say | None) -> Iterator[Row]:
    """All images of a folder, what else there is is said; those in a subfolder have its name as their label."""
    passed = []
    for file in _shown(path):
        inner = file.relative_to(path).parts
        if file.suffix.lower() in SUFFIXES:
            yield Row(str(file), {"image": file, "label": inner[0] if len(inner) > 1 else None})
        elif file.is_file():
            passed.append(file)
    _tell(path, passed, "end", say)


def _tell(path: Path, passed: list[Path], images: str, say: Say | None) -> None:
    """Say how many files are passed over, and of which kinds."""
    if passed and say:
        kinds = Counter(file.suffix.lower() or "without suffix" for file in passed).most_common(KINDS)
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds)
        count = len(passed)
        say(
            f"{path}: {count} {'file is' if count == 1 else 'files are'} passed over ({counts}), such as {passed[0]}; "
            f"images {images} in {', '.join(SUFFIXES)}"
        )


def _shown(folder: Path) -> list[Path]:
    """All that is in a folder, at any depth, but for what is hidden."""
    found = sorted(folder.rglob("*"))
    return [one for one in found if not any(part.startswith(".") for part in one.relative_to(folder).parts)]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A NumPy archive; what goes wrong with it is said with its name."""
    try:
        with path.open("rb") as file:  # NumPy leaves a file open that is no archive
            archive = np.load(file, allow_pickle=False)
            if not hasattr(archive, "files"):
                raise ValueError("it holds a single array")
            yield archive
    except (OSError, EOFError, ValueError, BadZipFile, zlib.error) as error:  # ValueError: pickles, which are not read
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{path} cannot be read as a NumPy archive: {error}") from error


def _archive(path: Path, part: str, labelled: bool) -> Iterator[Row]:
    pairs = KEYS[part] if labelled else (*KEYS["test"], *KEYS["train"])
    with _opened(path) as archive:
        pair = next((pair for pair in pairs if set(pair) <= set(archive.files)), None)
        if pair is None and not labelled:
            pair = next(((name, "") for name, _ in pairs if name in archive.files), None)
        if pair is None:
            known = ", ".join(dict.fromkeys(" and ".join(pair) if labelled else pair[0] for pair in pairs))
            raise AdapterError(f"{path} has the arrays {', '.join(archive.files)}; expected {known}")
        images = archive[pair[0]]
        labels = archive[pair[1]].reshape(-1).tolist() if pair[1] else [None] * len(images)
        names = archive["label_names"].tolist() if "label_names" in archive.files else None
    if images.ndim not in (3, 4) or len(images) != len(labels):
        raise AdapterError(
            f"{path}: expected images [count, height, width] or [count, height, width, channels] and as many labels; "
            f"found {list(images.shape)} and {len(labels)}"
        )
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        where = f"{path} {pair[0]}[{number}]"
        if names is None or label is None:
            yield Row(where, {"image": image, "label": label})
        elif label in range(len(names)):
            yield Row(where, {"image": image, "label": names[int(label)]})
        else:
            yield Row(where, problem=f"label is {label!r}, label_names has names for 0 to {len(names) - 1}")


def _table(
    name: str, split: str, columns: Mapping[str, str], needed: Collection[str], folder: Path | None
) -> Iterator[Row]:
    """Rows of a table; those without a column of a needed role have a problem."""
    for row in read(name, split):
        if problem := row.problem or lacks(row.values, [columns[role] for role in needed]):
            yield Row(row.where, problem=problem)
            continue
        value = row.values[columns["image"]]
        if isinstance(value, Mapping):  # datasets' images, undecoded
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        if isinstance(value, list):
            value = np.asarray(value)
        if isinstance(value, str):
            value = Path(value) if folder is None else folder / value
        if value is None:
            yield Row(row.where, problem="image is empty")
        else:
            yield Row(row.where, {"image": value, "label": row.values.get(columns.get("label", ""))})


def _in_rgb(opened: Image) -> Image:
    """Upright, and in 8 bits a channel: Pillow makes white of all that is above 255 in 16 bits."""
    image, operations = require("PIL.Image"), require("PIL.ImageOps")
    opened.load()
    try:
        upright: Image = operations.exif_transpose(opened)
    except (OSError, ValueError, SyntaxError, struct.error):  # broken EXIF data say nothing about the image
        upright = opened
    pixels = np.asarray(upright) if upright.mode[0] in "IF" else None
    if pixels is None:
        return upright.convert("RGB")
    if upright.mode.startswith("I;16") or opened.format in ("PNG", "PPM"):  # the latter's 16 bits may come as mode I
        pixels = (pixels / 257).round().astype(np.uint8)
    return image.fromarray(_as_bytes(pixels)).convert("RGB")


def _as_bytes(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[height, width] or [height, width, channels] of 0 to 255; from fractions of 1, and from channels first."""
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and pixels.shape[2] not in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.dtype == np.uint8:
        return pixels
    if not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(f"expected values from 0 to 255 or from 0 to 1, found {pixels.min()} to {pixels.max()}")
    if pixels.dtype == bool or (np.issubdtype(pixels.dtype, np.floating) and pixels.max() <= 1):
        pixels = pixels * 255
    return pixels.round().astype(np.uint8)
