"""Prompts: plain text to be continued, or a chat to be answered; one, or a file of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from doratune.errors import AdapterError
from doratune.inference.lines import lines_of
from doratune.train.tokens import ROLES


@dataclass(frozen=True)
class Prompt:
    """Text to be continued, or the messages of a chat to be answered."""

    text: str = ""
    messages: tuple[dict[str, str], ...] | None = None

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
            return tokenizer.apply_chat_template(list(self.messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise their own, in their own words
            raise AdapterError(f"the model's chat template refuses these messages: {error}") from error

    def as_json(self) -> dict[str, Any]:
        """For records: ``{"prompt": ...}`` or ``{"messages": [...]}``."""
        return {"prompt": self.text} if self.messages is None else {"messages": list(self.messages)}

    def shown(self) -> str:
        """What a reader wants to see of it: the text, or the last message."""
        return self.text if self.messages is None else self.messages[-1]["content"]


def chat(text: str, system: str | None = None, before: Sequence[dict[str, str]] = ()) -> Prompt:
    """One user message, after a system message and what was said before."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return Prompt(messages=(*first, *before, {"role": "user", "content": text}))


def read_prompts(path: Path, as_chat: bool = False, system: str | None = None) -> list[Prompt]:
    """Read a file of prompts.

    Tables (.jsonl, .json, .csv, .tsv, .parquet) have a column ``prompt`` or ``messages``; an answer at the end of the
    messages is left out, because the model is to write it. Any other file is text with a prompt a line; empty lines are
    passed over.

    Args:
        path: the file.
        as_chat: take each plain prompt as a user's message.
        system: system message of those chats.

    Raises:
        AdapterError: if the file cannot be read, or listing every line that cannot be used.
    """
    if not path.is_file():
        raise AdapterError(f"{path}: no such file")
    prompts: list[Prompt] = []
    problems: list[str] = []
    for row in lines_of(str(path)):
        problem = row.problem
        try:
            prompt = None if problem else _prompt(row.values)
        except ValueError as error:
            problem = str(error)
        if problem:
            problems.append(f"{row.where}: {problem}")
        elif prompt:
            prompts.append(chat(prompt.text, system) if as_chat and prompt.messages is None else prompt)
    if not prompts and not problems:
        problems.append(f"{path} holds no prompt")
    if problems:
        raise AdapterError.of("prompts that cannot be used", problems)
    return prompts


def _prompt(values: Mapping[str, Any]) -> Prompt:
    if "messages" in values:
        return Prompt(messages=_asked(values["messages"]))
    text = next((values[name] for name in ("prompt", "text") if name in values), None)
    if text is None:
        raise ValueError(f"expected a column prompt or messages, found {', '.join(values) or 'none'}")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"expected a text as prompt, found {text!r}")
    return Prompt(text)


def _asked(messages: Any) -> tuple[dict[str, str], ...]:
    """The messages up to the user's last one."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError("messages: expected a list of them")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise ValueError(f"message {number}: expected role and content, found {message!r}")
        if message.get("role") not in ROLES:
            raise ValueError(f"message {number}: role must be one of {', '.join(ROLES)}; found {message.get('role')!r}")
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not asked or asked[-1]["role"] == "assistant":
        raise ValueError("messages: found none that is to be answered")
    return tuple({"role": message["role"], "content": message["content"]} for message in asked)
