"""Text classification: a new head on a language model, trained with the adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from doratune.extras import require
from doratune.train import labels as classes
from doratune.train import sources
from doratune.train.columns import choose, described
from doratune.train.config import TrainConfig
from doratune.train.gather import BadRow, Say, gather, lacks, rows
from doratune.train.models import give_padding, load_tokenizer
from doratune.train.positions import check_length, longest_of
from doratune.train.sources import TABLES, Row
from doratune.train.tasks.division import divided
from doratune.train.tasks.prepared import Prepared
from doratune.train.tokens import cut_texts, string


@dataclass(frozen=True)
class Example:
    """A text and the name of its class."""

    text: str
    label: str


def problems(config: TrainConfig) -> Iterator[str]:
    """What is wrong with the sources, found before anything is loaded."""
    return sources.problems(config, _problem_of)


def _problem_of(name: str) -> str | None:
    path = sources.path_of(name)
    problem = sources.problem_of(name)
    if not problem and path.is_file() and path.suffix.lower() not in TABLES:
        return f"has no columns for text and label; name files that have ({', '.join(TABLES)})"
    return problem


def prepare(config: TrainConfig, say: Say) -> Prepared:
    """Read, check, tokenise and split.

    Raises:
        AdapterError: listing every row that cannot be used, or if there are fewer than two classes.
    """
    tokenizer = load_tokenizer(config.model)
    columns, use = _reading(config, say)
    examples = gather(rows(config.data, config.split), use, config, say)
    own, own_test = (
        gather(rows(data, split), use, config, say) if data else None
        for data, split in ((config.eval_data, config.eval_split), (config.test_data, config.test_split))
    )
    names, examples, others, test = divided(examples, own, own_test, config, say)
    train_set, held_out, tested = (
        _encoded(part, names, tokenizer, config.max_length, say) if part else None for part in (examples, others, test)
    )
    check_length(config, longest_of((train_set, held_out, tested)), say)
    told = f", {len(test)} to test on" if test else ""
    say(f"{len(examples)} texts in {len(names)} classes to train on, {len(others)} held out{told}")
    return _prepared(tokenizer, names, columns, train_set, held_out, tested)


def to_measure(config: TrainConfig, tokenizer: Any, labels: tuple[str, ...], say: Say) -> Prepared:
    """Read ``data``, and prepare them as a run prepares its held-out data.

    Raises:
        AdapterError: listing every row that cannot be used, or classes that are not among the labels.
    """
    columns, use = _reading(config, say)
    examples = gather(rows(config.data, config.split), use, config, say)
    classes.refuse_unknown({example.label for example in examples}, labels, "data")
    found = _encoded(examples, labels, tokenizer, config.max_length, say)
    check_length(config, longest_of((found,)), say)
    return _prepared(tokenizer, labels, columns, None, found, None)


def _reading(config: TrainConfig, say: Say) -> tuple[dict[str, str], Callable[[Row], Example]]:
    """The columns, and what makes an example of a row."""
    found, where = sources.columns_of(config.data, config.split)
    if not found:
        raise sources.without_rows(config.data, config.split)
    columns = choose(config, found, ["text", "label"], where)
    say(f"columns: {described(columns, config, found)}")

    def use(row: Row) -> Example:
        if problem := lacks(row.values, columns.values()):
            raise BadRow(problem)
        return Example(string(row.values[columns["text"]], "text"), classes.name_of(row.values[columns["label"]]))

    return columns, use


def _prepared(
    tokenizer: Any, names: tuple[str, ...], columns: dict[str, str], train: Any, held_out: Any, test: Any
) -> Prepared:
    give_padding(tokenizer)
    return Prepared(
        train,
        held_out,
        collate=require("transformers").DataCollatorWithPadding(tokenizer),
        processor=tokenizer,
        unit="texts",
        example="texts",
        labels=names,
        columns=columns,
        test=test,
    )


def _encoded(examples: Sequence[Example], names: tuple[str, ...], tokenizer: Any, length: int, say: Say) -> Any:
    datasets = require("datasets")
    encoded, longer = cut_texts([example.text for example in examples], tokenizer, length)
    if longer:
        say(f"{longer} of {len(examples)} texts were cut to {length} tokens (max_length)")
    return datasets.Dataset.from_dict({"input_ids": encoded, "labels": [names.index(e.label) for e in examples]})
