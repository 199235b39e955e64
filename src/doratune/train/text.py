"""Causal language modelling on text files: from files to blocks of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from doratune.errors import AdapterError
from doratune.train.config import SPLIT_SEED, TrainConfig
from doratune.train.extras import require

PIECE = 100_000
"""Characters that are tokenised at once: a document is cut at the next blank line."""


@dataclass(frozen=True)
class Blocks:
    """What a run trains and measures on: datasets of ``input_ids``, ``max_length`` tokens each."""

    train: Any
    held_out: Any
    max_length: int
    unused: int
    """Tokens at the end of the data that fill no block."""


def problems(config: TrainConfig) -> Iterator[str]:
    """What is wrong with the files, found before anything is loaded."""
    for option, files in (("data", config.data), ("eval_data", config.eval_data)):
        for name in files:
            path = Path(name).expanduser()
            if not path.exists():
                yield f"{option} {name}: no such file"
            elif path.is_dir():
                yield f"{option} {name} is a folder; name text files"
            elif path.stat().st_size == 0:
                yield f"{option} {name} is empty"
            else:
                problem = _unreadable(path)
                if problem:
                    yield f"{option} {name} {problem}"


def _unreadable(path: Path) -> str | None:
    try:
        with path.open(encoding="utf-8") as file:
            return None if any(line.strip() for line in file) else "holds nothing but white space"
    except UnicodeDecodeError as error:
        return f"is not UTF-8 text (byte {error.start}: {error.reason})"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def load_blocks(config: TrainConfig, tokenizer: Any) -> Blocks:
    """Tokenise, join and cut; hold a part out unless there is data to measure on.

    The tokens are kept in memory.

    Raises:
        AdapterError: if the text is too short for one block to train on and one to measure on.
    """
    train, unused = _blocks(config.data, tokenizer, config.max_length)
    if config.eval_data:
        held_out, _ = _blocks(config.eval_data, tokenizer, config.max_length)
    elif len(train) > 1:
        size = min(len(train) - 1, max(1, round(len(train) * config.eval_fraction)))
        parts = train.train_test_split(test_size=size, seed=SPLIT_SEED)
        train, held_out = parts["train"], parts["test"]
    else:
        held_out = []
    if not len(train) or not len(held_out):
        raise AdapterError(
            f"the text is too short: it fills {len(train)} blocks of {config.max_length} tokens to train on and "
            f"{len(held_out)} to measure on, at least one of each is needed; give more text or a smaller max_length"
        )
    return Blocks(train, held_out, config.max_length, unused)


def _blocks(files: Iterable[str], tokenizer: Any, length: int) -> tuple[Any, int]:
    datasets = require("datasets")
    tokens: list[int] = []
    for name in files:
        tokens += _tokens(Path(name).expanduser().read_text(encoding="utf-8"), tokenizer)
    used = len(tokens) // length * length
    blocks = {"input_ids": [tokens[start : start + length] for start in range(0, used, length)]}
    features = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))})
    return datasets.Dataset.from_dict(blocks, features=features), len(tokens) - used


def _tokens(text: str, tokenizer: Any) -> list[int]:
    """One document, with the signs that the tokenizer puts before a text and the one that ends it."""
    pieces = list(_pieces(text))
    encoded = tokenizer(pieces, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    start = [tokenizer.bos_token_id] if _adds_start(tokenizer) else []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [*start, *chain.from_iterable(encoded), *end]


def _adds_start(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n\n", start + PIECE)
        end = len(text) if end < 0 else end + 2
        yield text[start:end]
        start = end


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch of blocks: every token is predicted from those before it."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}


def continuation(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """What the model writes after a prompt, the likeliest token at each step."""
    require("transformers")
    was_training = model.training
    model.eval()
    try:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            out = model.generate(
                **inputs,
                max_new_tokens=tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                use_cache=True,
                pad_token_id=tokenizer.eos_token_id,
            )
    finally:
        model.train(was_training)
    text: str = tokenizer.decode(out[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text
