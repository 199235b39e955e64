"""Text generation: documents, prompts with completions, and chats, for causal language models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from doratune.errors import AdapterError
from doratune.extras import require
from doratune.train import sources
from doratune.train.config import TrainConfig
from doratune.train.gather import Say, gather, hold_out, set_aside
from doratune.train.models import load_config, load_tokenizer
from doratune.train.positions import check_length, longest_of
from doratune.train.tasks.batches import Packed, Padded, collate_blocks
from doratune.train.tasks.prepared import Prepared
from doratune.train.tasks.reader import Reader
from doratune.train.tasks.stream import prepare_stream
from doratune.train.tokens import Tokens


def problems(config: TrainConfig) -> Iterator[str]:
    """What is wrong with the sources, found before anything is loaded."""
    return sources.problems(config, sources.problem_of)


def prepare(config: TrainConfig, say: Say) -> Prepared:
    """Read, check, tokenise, split and pack.

    Raises:
        AdapterError: listing every row that cannot be used, or if there is too little text.
    """
    reader, blocks = _reader(config, load_tokenizer(config.model), say)
    if config.streaming:
        train, held_out, test = prepare_stream(config, reader, blocks, say)
        return _prepared(config, reader, train, held_out, test, blocks)
    examples = gather(reader.rows(config.data, config.split), reader.use, config, say)
    others, tested = (
        gather(reader.rows(names, split), reader.use, config, say) if names else None
        for names, split in ((config.eval_data, config.eval_split), (config.test_data, config.test_split))
    )
    if blocks and reader.documents:
        train, held_out, test, unused = _blocks(examples, others, tested, config)
        told = f", {len(test)} to test on" if test else ""
        say(
            f"{len(train)} blocks of {config.max_length} tokens to train on, {len(held_out)} held out{told}; "
            f"{unused} tokens at the end fill no block"
        )
        return _prepared(config, reader, train, held_out, test, blocks)
    reader.tell(say)
    if tested is None:
        examples, tested = set_aside(examples, config.test_fraction)
    if others is None:
        examples, others = set_aside(examples, config.eval_fraction)
    parts = {"to train on": examples, "held out": others, "to test on": tested}
    train, held_out, test = _fitted_rows(parts, blocks, config, say)
    if not len(train) or not len(held_out):
        raise AdapterError(
            f"{len(train)} examples to train on and {len(held_out)} to measure on are left, at least one of each is "
            "needed; give more data, or a larger max_length"
        )
    told = f", {len(test)} to test on" if len(test) else ""
    what = f"packed blocks of up to {config.max_length} tokens" if blocks else "examples"
    say(f"{len(train)} {what} to train on, {len(held_out)} held out{told}")
    return _prepared(config, reader, train, held_out, test, blocks)


def to_measure(config: TrainConfig, tokenizer: Any, say: Say) -> Prepared:
    """Read ``data``, and prepare them as a run prepares its held-out data.

    Raises:
        AdapterError: listing every row that cannot be used, or if there is too little text.
    """
    reader, blocks = _reader(config, tokenizer, say)
    examples = gather(reader.rows(config.data, config.split), reader.use, config, say)
    if blocks and reader.documents:
        found, unused = _joined(examples, config.max_length)
        if not len(found):
            raise AdapterError(
                f"the text is too short: it fills no block of {config.max_length} tokens; give more text or a smaller "
                "max_length"
            )
        say(f"{unused} tokens at the end fill no block of {config.max_length} tokens")
    else:
        (found,) = _fitted_rows({"to measure on": examples}, blocks, config, say)
        if not len(found):
            raise AdapterError("no example is left to measure on; give more data, or a larger max_length")
    return _prepared(config, reader, None, found, None, blocks)


def _reader(config: TrainConfig, tokenizer: Any, say: Say) -> tuple[Reader, bool]:
    """What reads the rows, and whether several of them are put into one block."""
    refuse_encoders(config.model)
    if config.max_length == 1:
        raise AdapterError("max_length is 1: in a text of one token there is none to predict; give 2 or more")
    reader = Reader(config, tokenizer, say)
    blocks = reader.documents if config.packing is None else config.packing
    if config.streaming or (blocks and reader.documents):
        check_length(config, config.max_length, say)
    return reader, blocks


def refuse_encoders(model: str) -> None:
    """transformers loads encoders as language models, too: tokens then see those that they are to predict.

    Of a model with encoder and decoder it takes the decoder alone.

    Raises:
        AdapterError: if this is one of them, or its config cannot be loaded.
    """
    transformers, own = require("transformers"), load_config(model)
    advice = "name a decoder (Llama, Qwen, GPT-2, ...), or another task"
    if own.is_encoder_decoder:
        raise AdapterError(f"model {model}: a {own.model_type} has an encoder, which would be left out; {advice}")
    # Decoders that know the word is_decoder say that they are one, or have never been trained with masks.
    if getattr(own, "is_decoder", None) is False and type(own) in transformers.MODEL_FOR_MASKED_LM_MAPPING:
        raise AdapterError(
            f"model {model}: a {own.model_type} is an encoder, in which a token sees those after it, so that "
            f"there is nothing to predict; {advice}"
        )


def fitted(examples: Sequence[Tokens], length: int, say: Say, what: str) -> list[Tokens]:
    """Examples of at most ``length`` tokens; how many were cut, and how many had nothing left to learn, is said."""
    cut = [example.cut(length) for example in examples]
    kept = [example for example in cut if example.learns]
    longer = sum(len(example.ids) > length for example in examples)
    if longer:
        say(f"{longer} of {len(examples)} examples {what} were cut to {length} tokens (max_length)")
    lost = len(examples) - len(kept)
    if lost:
        say(f"{lost} examples {what} were left out: nothing is to be learnt within {length} tokens (max_length)")
    return kept


def _fitted_rows(parts: Mapping[str, Sequence[Tokens]], packed: bool, config: TrainConfig, say: Say) -> list[Any]:
    """Prompts or chats of each part, cut and packed; a part is called by what it is for."""
    found = [_rows(fitted(part, config.max_length, say, what)) for what, part in parts.items()]
    check_length(config, longest_of(found), say)
    if not packed:
        return found
    pack = require("trl").pack_dataset  # whole examples, best fit first; no example sees another
    return [pack(part, config.max_length, "bfd") if len(part) else part for part in found]


def _blocks(
    examples: list[Tokens], others: list[Tokens] | None, tested: list[Tokens] | None, config: TrainConfig
) -> tuple[Any, Any, Any, int]:
    length = config.max_length
    train, unused = _joined(examples, length)
    train, test = _part(train, tested, config.test_fraction, length)
    train, held_out = _part(train, others, config.eval_fraction, length)
    if not len(train) or not len(held_out):
        raise AdapterError(
            f"the text is too short: it fills {len(train)} blocks of {length} tokens to train on and "
            f"{len(held_out)} to measure on, at least one of each is needed; give more text or a smaller max_length"
        )
    return train, held_out, test, unused


def _part(train: Any, own: list[Tokens] | None, fraction: float, length: int) -> tuple[Any, Any]:
    """The blocks to train on, and those of another part: of its own texts, else a fraction of the former."""
    if own is not None:
        return train, _joined(own, length)[0]
    kept, held = hold_out(len(train), fraction) if fraction else (range(len(train)), [])
    return train.select(kept), train.select(held)


def _joined(examples: list[Tokens], length: int) -> tuple[Any, int]:
    """Blocks of equal length, and the tokens at the end that fill none."""
    ids = np.concatenate([np.frombuffer(example.ids, dtype=np.int32) for example in examples])
    used = len(ids) // length * length
    return _dataset({"input_ids": ids[:used]}, np.arange(0, used + 1, length)), len(ids) - used


def _rows(examples: list[Tokens]) -> Any:
    """One row an example."""
    ends = np.cumsum([0, *(len(example.ids) for example in examples)])
    parts = {"input_ids": [e.ids for e in examples], "labels": [e.labels for e in examples]}
    empty = np.zeros(0, dtype=np.int32)
    flat = {name: np.concatenate([empty, *(np.frombuffer(a, np.int32) for a in p)]) for name, p in parts.items()}
    return _dataset(flat, ends)


def _dataset(columns: Mapping[str, np.ndarray[Any, Any]], ends: np.ndarray[Any, Any]) -> Any:
    """Arrow lists: four bytes a token."""
    arrow, datasets = require("pyarrow"), require("datasets")
    offsets = arrow.array(ends.astype(np.int64))
    lists = {name: arrow.LargeListArray.from_arrays(offsets, arrow.array(flat)) for name, flat in columns.items()}
    return datasets.Dataset(arrow.table(lists))


def _prepared(config: TrainConfig, reader: Reader, train: Any, held_out: Any, test: Any, blocks: bool) -> Prepared:
    tokenizer = reader.tokenizer
    packed = blocks and not reader.documents
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    collate: Any = Packed(pad) if packed else collate_blocks if blocks else Padded(pad)
    return Prepared(
        train,
        held_out,
        collate,
        tokenizer,
        unit="tokens",
        example="packed blocks" if packed else f"blocks of {config.max_length} tokens" if blocks else "examples",
        columns=reader.columns,
        test=test if test is not None and len(test) else None,
    )
