"""Text that is read while training, for data larger than memory."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from doratune.errors import AdapterError
from doratune.extras import require
from doratune.train.config import TrainConfig
from doratune.train.gather import BadRow, Say, gather, usable
from doratune.train.tasks.reader import Reader
from doratune.train.tokens import Tokens

CHECKED = 1000
"""Rows of a stream that are checked before training."""
WINDOW = 1000
"""Examples of a stream among which the order is shuffled."""
HELD_OUT = 100
"""Examples at the beginning of a stream that are held out."""


def prepare_stream(config: TrainConfig, reader: Reader, blocks: bool, say: Say) -> tuple[Any, Any, Any]:
    """Data to train on, to measure on and to test on; the first rows are checked, the others as they come.

    Raises:
        AdapterError: listing the first rows that cannot be used, or if there is too little text.
    """
    if blocks and not reader.documents:
        raise AdapterError("streaming does not pack prompts and chats; leave out packing")
    gather(islice(reader.rows(config.data, config.split), CHECKED), reader.use, config, say)
    say(f"streaming: the first {CHECKED} rows are checked, the others when they are read")
    datasets = require("datasets")
    # Not a function made here: a worker that is started anew, as on macOS, could not be given it.
    make = functools.partial(_blocks if blocks else _examples, reader, config)
    # A list of names would be dealt out to workers, each of which would hold out rows of its own.
    names = {"names": tuple(config.data), "split": config.split}
    stream = datasets.IterableDataset.from_generator(make, gen_kwargs=names)
    if config.eval_data:
        held_out = list(make(config.eval_data, config.eval_split))
    else:
        held_out = list(stream.take(HELD_OUT))
        stream = stream.skip(HELD_OUT)
        say(f"the first {len(held_out)} examples of the stream are held out")
    if not held_out or next(iter(stream), None) is None:
        raise AdapterError(f"the stream holds too little text: nothing is left after {len(held_out)} held-out examples")
    test = list(make(config.test_data, config.test_split)) if config.test_data else []
    shuffled = stream.shuffle(seed=config.seed, buffer_size=WINDOW)
    return shuffled, datasets.Dataset.from_list(held_out), datasets.Dataset.from_list(test)


def _examples(reader: Reader, config: TrainConfig, names: Sequence[str], split: str) -> Iterator[dict[str, list[int]]]:
    for example in _usable(reader, config, names, split):
        cut = example.cut(config.max_length)
        if cut.learns:
            yield {"input_ids": cut.ids.tolist(), "labels": cut.labels.tolist()}


def _blocks(reader: Reader, config: TrainConfig, names: Sequence[str], split: str) -> Iterator[dict[str, list[int]]]:
    left: array[int] = array("i")
    for example in _usable(reader, config, names, split):
        left += example.ids
        used = len(left) // config.max_length * config.max_length
        for start in range(0, used, config.max_length):
            yield {"input_ids": left[start : start + config.max_length].tolist()}
        left = left[used:]


def _usable(reader: Reader, config: TrainConfig, names: Sequence[str], split: str) -> Iterator[Tokens]:
    for row in reader.rows(names, split):
        try:
            yield usable(row, reader.use)
        except BadRow as error:
            if not config.skip_bad:
                raise AdapterError(f"{row.where}: {error} (--skip-bad goes on without such rows)") from error
