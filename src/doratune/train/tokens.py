"""Documents, prompts and chats as tokens, and which of these the loss is taken on."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

from doratune.errors import AdapterError
from doratune.extras import require
from doratune.train.chats import apply_template, conversation, refuse_halves, short, tools_of
from doratune.train.gather import BadRow

PIECE = 100_000
"""Characters that are tokenised at once: a document is cut at the next blank line."""
IGNORED = -100
"""Label of a token on which no loss is taken."""


@dataclass(frozen=True)
class Tokens:
    """One example: its tokens, and for each the label: the token itself, or ``IGNORED``."""

    ids: array[int]
    labels: array[int]

    @classmethod
    def of(cls, ids: Sequence[int], learnt: Sequence[bool] | None = None) -> Tokens:
        """Tokens, of which those marked are learnt; None: all."""
        if learnt is None:
            return cls(array("i", ids), array("i", ids))
        return cls(array("i", ids), array("i", [t if yes else IGNORED for t, yes in zip(ids, learnt, strict=True)]))

    def cut(self, length: int) -> Tokens:
        """The first tokens."""
        return Tokens(self.ids[:length], self.labels[:length])

    @property
    def learns(self) -> bool:
        """Whether any token is learnt; the first one has nothing before it to be predicted from."""
        return any(label != IGNORED for label in self.labels[1:])


def document(text: Any, tokenizer: Any) -> Tokens:
    """A whole text, with the tokenizer's special tokens before it and its end-of-text token after it.

    Raises:
        BadRow: if there is no text.
    """
    pieces = list(_pieces(string(text, "text")))
    encoded = tokenizer(pieces, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return Tokens.of([*_start(tokenizer), *chain.from_iterable(encoded), *_end(tokenizer)])


def opening(prompt: str, tokenizer: Any) -> list[int]:
    """A prompt's tokens, in training as in generation: special tokens before it, none after it."""
    return [*_start(tokenizer), *plain(prompt, tokenizer)]


def plain(text: str, tokenizer: Any) -> list[int]:
    """A text's tokens without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return ids


def cut_texts(texts: Sequence[str], tokenizer: Any, length: int) -> tuple[list[list[int]], int]:
    """Tokens of whole texts, special ones among them, and how many texts had to be cut to so many."""
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    ids = tokenizer(list(texts), **options)["input_ids"]
    longer = sum(len(row) > length for row in ids)
    if longer:
        ids = tokenizer(list(texts), truncation=True, max_length=length, **options)["input_ids"]
    return ids, longer


def written(ids: Sequence[int], new: Sequence[int], tokenizer: Any) -> str:
    """What new tokens add to the text; decoded alone they would lose a space that some tokenizers drop at a start."""
    before = tokenizer.decode(ids, skip_special_tokens=True)
    whole: str = tokenizer.decode([*ids, *new], skip_special_tokens=True)
    return whole[len(before) :]


def completion(prompt: Any, answer: Any, tokenizer: Any, learn_prompt: bool) -> Tokens:
    """A prompt and what follows it.

    Raises:
        BadRow: if one of them is missing.
    """
    before = opening(string(prompt, "prompt"), tokenizer)
    after = [*plain(string(answer, "completion"), tokenizer), *_end(tokenizer)]
    return Tokens.of(before + after, [learn_prompt] * len(before) + [True] * len(after))


def chat(
    messages: Any, tokenizer: Any, learn_all: bool, marked: str | None = None, tools: Any = None, system: Any = None
) -> Tokens:
    """A conversation in the model's chat template; what the assistant says is learnt, or all.

    Args:
        messages: of role and content; what an assistant says with a weight of 0 is not learnt.
        tokenizer: with a chat template.
        learn_all: learn the whole conversation.
        marked: a template that marks what the assistant says; None: that is what each of its turns adds.
        tools: functions that the assistant may call, as ``tools_of`` takes them.
        system: what the system message says, if the messages do not begin with one.

    Raises:
        BadRow: if roles, contents or tools are not those of a chat, the assistant says nothing, or the template does
            not take them.
    """
    turns, learns = conversation(messages, system)
    if any("tool_calls" in turn for turn in turns) and "tool_calls" not in (marked or tokenizer.chat_template):
        raise BadRow("calls functions, which the model's chat template does not write")
    rendered = functools.partial(_rendered, tokenizer, tools=tools_of(tools))
    if learn_all:
        return Tokens.of(rendered(turns)["input_ids"])
    if marked is not None:
        found = rendered(turns, chat_template=marked, return_assistant_tokens_mask=True)
        said = [yes for yes, turn in zip(learns, turns, strict=True) if turn["role"] == "assistant"]
        return Tokens.of(found["input_ids"], _of_turns(list(map(bool, found["assistant_masks"])), said))
    whole = rendered(turns)["input_ids"]
    learnt = [False] * len(whole)
    for number in (number for number, learn in enumerate(learns) if learn):
        before = rendered(turns[:number], add_generation_prompt=True)["input_ids"]
        upto = rendered(turns[: number + 1])["input_ids"]
        if whole[: len(before)] != before or whole[: len(upto)] != upto:
            raise BadRow(
                f"the chat template changes earlier turns, so what message {number + 1} adds cannot be told; "
                "leave out all turns after the first answer, or use --loss-on all"
            )
        learnt[len(before) : len(upto)] = [True] * (len(upto) - len(before))
    return Tokens.of(whole, learnt)


def _of_turns(marks: list[bool], learns: Sequence[bool]) -> list[bool]:
    """Of what the assistant says, marked, the turns that are learnt."""
    if all(learns):
        return marks
    starts = [mark and not before for before, mark in zip([False, *marks], marks, strict=False)]
    turns = list(accumulate(starts))
    if turns[-1] != len(learns):
        raise BadRow("the chat template does not mark each turn of the assistant: weights cannot be followed")
    return [mark and learns[turn - 1] for mark, turn in zip(marks, turns, strict=True)]


def marked_template(tokenizer: Any) -> str | None:
    """A chat template that marks what the assistant says: the tokenizer's own, or TRL's version; None: neither."""
    templates = require("trl.chat_template_utils")
    if templates.has_generation_markers(tokenizer.chat_template):
        own: str = tokenizer.chat_template
        return own
    try:
        return templates.get_training_chat_template(tokenizer)
    except ValueError:  # TRL does not know it
        return None


def require_template(tokenizer: Any, model: str) -> None:
    """A model's tokenizer has to have a chat template.

    Raises:
        AdapterError: if it has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise AdapterError(
            f"the tokenizer of {model} has no chat template: use an instruction-tuned model, or columns with prompt "
            "and completion (--prompt-column, --completion-column)"
        )


def string(value: Any, what: str) -> str:
    """A text that is not empty.

    Raises:
        BadRow: if it is not one.
    """
    if not isinstance(value, str):
        raise BadRow(f"{what}: expected text, found {short(value)}")
    if not value.strip():
        raise BadRow(f"{what} is empty")
    refuse_halves(value, what)
    return value


def _rendered(tokenizer: Any, turns: list[dict[str, Any]], **options: Any) -> Mapping[str, list[int]]:
    if not turns:  # an answer without a question
        return {"input_ids": []}
    try:
        rendered: Mapping[str, list[int]] = apply_template(tokenizer, turns, tokenize=True, return_dict=True, **options)
    except Exception as error:  # templates refuse by raising whatever they like
        raise BadRow(f"the chat template refuses it: {error}") from error
    return rendered


def _start(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text; BERT's also puts one after it."""
    text = plain("a", tokenizer)
    whole: list[int] = tokenizer("a")["input_ids"]
    fits = (place for place in range(len(whole)) if whole[place : place + len(text)] == text)
    return whole[: next(fits, 0)]


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n\n", start + PIECE)
        end = len(text) if end < 0 else end + 2
        yield text[start:end]
        start = end
