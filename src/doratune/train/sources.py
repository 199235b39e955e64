"""Rows from files, folders and the hub: one reader for every format, and each row knows its file and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from doratune.errors import AdapterError, first_line
from doratune.extras import require
from doratune.hub import is_path
from doratune.train.config import TrainConfig

TEXT = (".txt", ".text", ".md")
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PACKED = {".gz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd", ".zip": "unzip"}
"""Compressed files, and what unpacks them."""
OBJECTS = (".jsonl", ".ndjson", ".json")
"""Formats in which each row may have columns of its own."""
FORMATS = ", ".join((*TABLES, *TEXT))
LARGEST_FIELD = 2**31 - 1
PIPE = "is a pipe or a device: data are read twice, which it cannot be; write them to a file and name that"
LISTED = 20
"""Bad rows that are listed one by one."""
NAMED = 1000
"""Rows of a source that are looked at for the names of its columns, where rows differ."""


@dataclass(frozen=True)
class Row:
    """One row, or what is wrong with it."""

    where: str
    """File and line, or data set and row."""
    values: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None


def path_of(name: str) -> Path:
    """A name as a local path."""
    return Path(name).expanduser()


def is_hub_name(name: str) -> bool:
    """Whether a name that is no local path can be a data set of the hub: ``name`` or ``owner/name``."""
    path = path_of(name)
    looks_local = is_path(name) or path.suffix.lower() in (*TABLES, *TEXT) or path.suffix in (".npz", *PACKED)
    return not path.exists() and not looks_local


def is_dataset_folder(path: Path) -> bool:
    """Whether datasets' ``save_to_disk`` wrote this folder."""
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))


def has_columns(name: str) -> bool:
    """Whether a source is a table or a data set, and not text or images as they are."""
    path = path_of(name)
    if path.is_dir():
        return is_dataset_folder(path)
    return not path.is_file() or path.suffix.lower() in TABLES


def problem_of(name: str) -> str | None:
    """What is wrong with a text source as far as one can see without reading it."""
    path = path_of(name)
    if not path.exists():
        if is_hub_name(name):
            return None
        pattern = "; patterns are for the shell: leave out the quotes, or name the files" if "*" in name else ""
        return f"no such file{pattern}"
    if path.is_dir():
        if is_dataset_folder(path):
            return None
        return (
            f"is a folder, but not one of datasets' save_to_disk; name files ({FORMATS}), or, for a folder of images, "
            "--task image-classification"
        )
    if not path.is_file():
        return PIPE
    if path.stat().st_size == 0:
        return "is empty"
    if tool := PACKED.get(path.suffix.lower()):
        return f"is compressed; unpack it ({tool}) and name what is in it"
    if path.suffix.lower() not in TABLES:
        return _not_text(path)
    return None


def problems(config: TrainConfig, problem_of: Callable[[str], str | None]) -> Iterator[str]:
    """What is wrong with the sources of a run; ``problem_of`` looks at one."""
    for option in ("data", "eval_data", "test_data"):
        for name in getattr(config, option):
            if not name:  # an empty variable of a shell, which as a path would be the working directory
                yield f"{option}: a name is empty"
            elif problem := problem_of(name):
                yield f"{option} {name}{':' if problem.startswith('no ') else ''} {problem}"


def _not_text(path: Path) -> str | None:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return None if any(line.strip() for line in file) else "holds nothing but white space"
    except UnicodeDecodeError as error:
        return f"is not UTF-8 text (byte {error.start}: {error.reason}); files with columns end in {', '.join(TABLES)}"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def read(name: str, split: str, streaming: bool = False) -> Iterator[Row]:
    """Rows of a source, in their order. A text file is one row with the column ``text``.

    Raises:
        AdapterError: if the source as a whole cannot be read; rows that cannot are yielded with their problem.
    """
    path = path_of(name)
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    try:
        if not path.exists() and is_hub_name(name):
            yield from rows_of(_from_hub(name, split, streaming), name)
        elif path.is_dir():
            yield from rows_of(_from_folder(path, split), name)
        elif path.suffix.lower() in readers:
            yield from readers[path.suffix.lower()](path)
        else:
            yield Row(name, {"text": path.read_text(encoding="utf-8-sig")})
    except UnicodeDecodeError as error:
        raise AdapterError(f"{name} is not UTF-8 text (byte {error.start}: {error.reason})") from error
    except OSError as error:
        raise AdapterError(f"{name} cannot be read: {error.strerror or error}") from error


def columns_of(names: Iterable[str], split: str, streaming: bool = False) -> tuple[list[str], str]:
    """Columns of several sources in order of appearance, and what row or rows have them; none if no row can be read.

    Raises:
        AdapterError: if a source as a whole cannot be read.
    """
    found: dict[str, None] = {}
    first: Row | None = None
    for name in names:
        path = path_of(name)
        if path.is_file() and path.suffix.lower() not in TABLES:
            rows = iter([Row(name, {"text": None})])  # not read twice: it may be large
        else:
            rows = (row for row in read(name, split, streaming) if not row.problem)
        for row in islice(rows, NAMED if path.suffix.lower() in OBJECTS else 1):
            first = first or row
            found.update(dict.fromkeys(row.values))
    if first is None:
        return [], ", ".join(names)
    alike = len(first.values) == len(found)
    return list(found), first.where if alike else f"{first.where} and the rows after it"


def without_rows(names: Iterable[str], split: str) -> AdapterError:
    """The error about sources of which no row can be read, with what is wrong with the first ones."""
    bad = (f"{row.where}: {row.problem}" for name in names for row in read(name, split) if row.problem)
    return AdapterError.of("no row can be read", list(islice(bad, NAMED)) or [f"{', '.join(names)}: no rows"], LISTED)


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{path}:{number}"
            if not raw.strip():
                continue
            try:
                value = json.loads(raw.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                yield Row(where, problem=f"is not UTF-8 text ({error.reason})")
            except ValueError as error:
                yield Row(where, problem=f"is not JSON: {error}")
            else:
                yield _object(where, value)


def _json(path: Path) -> Iterator[Row]:
    """A list of objects, or an object with one such list that is no chat; objects line by line are taken, too."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        if "Extra data" not in str(error):
            raise AdapterError(f"{path} is not JSON: {error}") from error
        yield from _jsonl(path)
        return
    if isinstance(whole, dict):
        lists = [value for value in whole.values() if isinstance(value, list) and not _is_chat(value)]
        whole = lists[0] if len(lists) == 1 else [whole]
    if not isinstance(whole, list):
        raise AdapterError(f"{path}: expected a list of objects, found {type(whole).__name__}")
    for number, value in enumerate(whole, 1):
        yield _object(f"{path} row {number}", value)


def _is_chat(value: list[Any]) -> bool:
    return all(isinstance(one, dict) and ("role" in one or "from" in one) for one in value)


def _object(where: str, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(where, value)
    return Row(where, problem=f"expected an object with columns, found {type(value).__name__}")


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(LARGEST_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        # Strict: a quote out of place would make one field of all the rows up to the next one.
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        start = 1
        try:
            names = next(reader, None)
            if not names:
                raise AdapterError(f"{path} has no header line with the names of its columns")
            if twice := [name for name in dict.fromkeys(names) if name and names.count(name) > 1]:
                raise AdapterError(f"{path}: several columns are called {', '.join(map(repr, twice))}; rename them")
            start = reader.line_num + 1
            for fields in reader:
                where, start = f"{path}:{start}", reader.line_num + 1
                if not fields:
                    continue
                if len(fields) != len(names):
                    yield Row(where, problem=f"has {len(fields)} fields, the header {len(names)}")
                else:
                    yield Row(where, dict(zip(names, fields, strict=True)))
        except csv.Error as error:
            raise AdapterError(
                f"{path}:{start} cannot be read: {error} (a field that begins with a quote ends with one, and those "
                "inside are doubled)"
            ) from error


def _parquet(path: Path) -> Iterator[Row]:
    parquet = require("pyarrow.parquet")
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:  # pyarrow's own kinds, for whatever is not Parquet
        raise AdapterError(f"{path} is not Parquet: {error}") from error
    number = 0
    for batch in file.iter_batches(batch_size=1000):
        for values in batch.to_pylist():
            number += 1
            yield Row(f"{path} row {number}", values)


def _from_folder(path: Path, split: str) -> Any:
    datasets = require("datasets")
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a broken folder makes it raise
        raise AdapterError(f"{path} cannot be read as a data set: {error}") from error
    if not isinstance(found, dict):
        return found
    if split not in found:
        raise AdapterError(f"{path} has no split {split!r}; it has {', '.join(found)} (--split, --eval-split)")
    return found[split]


def _from_hub(name: str, split: str, streaming: bool) -> Any:
    datasets = require("datasets")
    try:
        return datasets.load_dataset(name, split=split, streaming=streaming)
    except Exception as error:  # no network, no such name, no such split, no access: it says which
        raise AdapterError(
            f"data {name}: there is no file or folder of that name, and as a data set of the hub it could not be "
            f"loaded: {first_line(error)} (without a network, name a downloaded file ({FORMATS}) or a folder of "
            "save_to_disk)"
        ) from error


def rows_of(dataset: Any, name: str) -> Iterator[Row]:
    """Rows of a data set of the datasets library: class numbers as names, images undecoded."""
    datasets = require("datasets")
    features = dataset.features or {}
    for column, feature in features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    classes = {column: f for column, f in features.items() if isinstance(f, datasets.ClassLabel)}
    for number, values in enumerate(dataset):
        for column, feature in classes.items():
            known = isinstance(values[column], int) and 0 <= values[column] < feature.num_classes
            values[column] = feature.int2str(values[column]) if known else None
        yield Row(f"{name} row {number + 1}", values)
