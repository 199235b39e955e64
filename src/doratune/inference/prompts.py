"""Prompts: plain text to be continued, or a chat to be answered; one, or a file of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from doratune.errors import AdapterError
from doratune.inference.lines import lines_of
from doratune.train.chats import apply_template, system_of, tools_of, turns_of
from doratune.train.columns import GUESSES, PARTS_OF_PROMPTS, half_a_prompt
from doratune.train.gather import BadRow, lacks
from doratune.train.information import Information
from doratune.train.prompt_template import fields_of, filled
from doratune.train.sources import LISTED
from doratune.train.tokens import string


@dataclass(frozen=True)
class Prompt:
    """Text to be continued, or the messages of a chat to be answered."""

    text: str = ""
    messages: tuple[dict[str, Any], ...] | None = None
    tools: tuple[Any, ...] | None = None
    """Functions that the model may call in its answer."""
    where: str = field(default="", compare=False)
    """File and line that it was read from."""

    def render(self, tokenizer: Any) -> str:
        """The text that the model gets.

        Raises:
            AdapterError: for a chat, if the tokenizer has no chat template or the template refuses the messages.
        """
        if self.messages is None:
            return self.text
        if not tokenizer.chat_template:
            raise AdapterError("the model's tokenizer has no chat template; give the prompt as plain text")
        try:
            return apply_template(
                tokenizer,
                self.messages,
                tools=None if self.tools is None else list(self.tools),
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # templates raise their own, in their own words
            place = f"{self.where}: " if self.where else ""
            raise AdapterError(f"{place}the model's chat template refuses these messages: {error}") from error

    def as_json(self) -> dict[str, Any]:
        """For records: ``{"prompt": ...}`` or ``{"messages": [...]}``."""
        return {"prompt": self.text} if self.messages is None else {"messages": list(self.messages)}

    def shown(self) -> str:
        """What a reader wants to see of it: the text, or the last message."""
        return self.text if self.messages is None else str(self.messages[-1].get("content"))


def chat(text: str, system: str | None = None, before: Sequence[dict[str, Any]] = ()) -> Prompt:
    """One user message, after a system message and what was said before."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return Prompt(messages=(*first, *before, {"role": "user", "content": text}))


@dataclass(frozen=True)
class PromptColumns:
    """Which columns of a table make up its prompts; guessed where neither is given."""

    column: str | None = None
    """Column of the whole prompt."""
    template: str | None = None
    """Prompt made of columns, such as ``"Question: {question}\\nAnswer: "``."""
    trained: str | None = None
    """Template that was trained with, used where a row has all of its columns."""

    @classmethod
    def of(cls, folders: Iterable[Path], column: str | None = None, template: str | None = None) -> PromptColumns:
        """What was asked for, and the template that what lies in all these folders was trained with, if it is one."""
        noted = {about.prompt_template if about else None for about in map(Information.load, folders)}
        return cls(column, template, noted.pop() if len(noted) == 1 else None)

    def prompt(self, values: Mapping[str, Any]) -> Prompt:
        """The prompt of a row.

        Raises:
            BadRow: if it has none, or one that may be half of it.
        """
        if self.template is not None:
            return Prompt(filled(self.template, values))
        if self.column is not None:
            if problem := lacks(values, [self.column]):
                raise BadRow(problem)
            if isinstance(values[self.column], list | tuple):
                return _chat(values[self.column], values)
            return Prompt(string(values[self.column], self.column))
        messages, text = _column(values, "messages"), _column(values, "prompt", "text")
        if messages is not None:
            return _chat(values[messages], values)
        if self.trained is not None and all(name in values for name in fields_of(self.trained)):
            return Prompt(filled(self.trained, values))
        if text is None:
            raise BadRow(f"expected a column prompt or messages, found {', '.join(map(str, values)) or 'none'}")
        parts = [name for name in PARTS_OF_PROMPTS if name in values]
        if text in parts and len(parts) > 1:
            raise BadRow(half_a_prompt(text, parts))
        if isinstance(values[text], list | tuple):
            return _chat(values[text], values)
        return Prompt(string(values[text], text))


def read_prompts(
    path: Path, as_chat: bool = False, system: str | None = None, columns: PromptColumns | None = None
) -> list[Prompt]:
    """Read a file of prompts.

    Tables (.jsonl, .json, .csv, .tsv, .parquet) have a column for prompts or messages, found as in training; an answer
    at the end of the messages is left out, because the model is to write it. Any other file is text with a prompt a
    line; empty lines are passed over.

    Args:
        path: the file, or a pipe of text.
        as_chat: take each plain prompt as a user's message.
        system: system message of those chats.
        columns: which columns of a table make up its prompts.

    Raises:
        AdapterError: if the file cannot be read, or listing every line that cannot be used.
    """
    if not path.exists():
        raise AdapterError(f"{path}: no such file")
    if path.is_dir():
        raise AdapterError(f"{path} is a folder; expected a file of prompts")
    columns = columns or PromptColumns()
    prompts: list[Prompt] = []
    problems: list[str] = []
    for row in lines_of(str(path)):
        problem = row.problem
        try:
            prompt = None if problem else columns.prompt(row.values)
        except BadRow as error:
            problem = str(error)
        if problem:
            problems.append(f"{row.where}: {problem}")
        elif prompt:
            asked = chat(prompt.text, system) if as_chat and prompt.messages is None else prompt
            prompts.append(replace(asked, where=row.where))
    if not prompts and not problems:
        problems.append(f"{path} holds no prompt")
    if problems:
        raise AdapterError.of("prompts that cannot be used", problems, at_most=LISTED)
    return prompts


def _column(values: Mapping[str, Any], *roles: str) -> str | None:
    return next((name for role in roles for name in GUESSES[role] if name in values), None)


def _chat(messages: Any, values: Mapping[str, Any]) -> Prompt:
    """The messages up to the user's last one, with the row's functions and system message."""
    tools, turns = tools_of(values.get("tools")), turns_of(messages, system_of(values))
    asked = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    if not asked or asked[-1]["role"] == "assistant":
        raise BadRow("messages: found none that is to be answered")
    return Prompt(messages=tuple(asked), tools=None if tools is None else tuple(tools))
