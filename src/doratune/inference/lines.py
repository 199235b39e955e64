"""Rows of tables, and lines of text files."""

from __future__ import annotations

from collections.abc import Iterator

from doratune.train.sources import TABLES, Row, path_of, read


def lines_of(name: str, split: str = "train") -> Iterator[Row]:
    """Rows of a table or data set; of a text file its lines, as the column ``text``, but for empty ones.

    Raises:
        AdapterError: if the source as a whole cannot be read.
    """
    path = path_of(name)
    for row in read(name, split):
        if path.is_dir() or path.suffix.lower() in TABLES:
            yield row
        else:
            lines = enumerate(row.values["text"].split("\n"), 1)  # splitlines has eight more ends, as in "a\u2028b"
            yield from (Row(f"{name}:{number}", {"text": line}) for number, line in lines if line.strip())
