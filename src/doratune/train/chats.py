"""Chats in the ways in which data hold them, as the messages that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from doratune.train.gather import BadRow

ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_ROLES = {"human": "user", "gpt": "assistant", "function": "tool", "observation": "tool"}
"""What ShareGPT's files, LLaMA-Factory's and old ones of OpenAI call them."""
CALLING = "function_call"
"""LLaMA-Factory's role of an assistant that calls a function; in old files of OpenAI the field of the call."""
MAY_BE_EMPTY = ("system", "developer", "tool")
SYSTEM_COLUMNS = ("system", "system_prompt")
"""Columns beside chats that hold the system message."""


def conversation(messages: Any, system: Any = None) -> tuple[list[dict[str, Any]], list[bool]]:
    """A chat to learn from: messages as ``role`` and ``content``, and which of them are learnt.

    Raises:
        BadRow: saying which message is wrong, or if the assistant says nothing to learn.
    """
    turns, learnt = turns_of(messages, system), []
    for number, turn in enumerate(turns, 1):
        weight = turn.pop("weight", 1)  # in OpenAI's files 0 is an answer that is not to be learnt
        if weight not in (0, 1):
            raise BadRow(f"message {number}: weight must be 0 or 1; found {short(weight)}")
        learnt.append(turn["role"] == "assistant" and weight == 1)
    if not any(learnt):
        raise BadRow("no message of the assistant: there is nothing to learn")
    return turns, learnt


def system_of(values: Mapping[str, Any]) -> Any:
    """What the columns of a row beside its chat hold as the system message."""
    return next((values[name] for name in SYSTEM_COLUMNS if values.get(name)), None)


def asked(messages: Any) -> Any:
    """The messages of a prompt: what is said in them is not learnt."""
    return [{**one, "weight": 0} if isinstance(one, Mapping) else one for one in messages]


def turns_of(messages: Any, system: Any = None) -> list[dict[str, Any]]:
    """Messages as ``role`` and ``content``, whoever speaks.

    Args:
        messages: a list of them, or its JSON.
        system: what the system message says, if the chat does not begin with one.

    Raises:
        BadRow: saying which message is wrong.
    """
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        try:
            messages = json.loads(messages)
        except ValueError as error:
            raise BadRow(f"expected a list of messages, or its JSON: {error}") from error
    if not isinstance(messages, list | tuple) or not messages:
        raise BadRow(f"expected a list of messages, found {short(messages)}")
    turns = [_turn(message, f"message {number}") for number, message in enumerate(messages, 1)]
    if system is None or system == "" or turns[0]["role"] in ("system", "developer"):
        return turns
    if not isinstance(system, str):
        raise BadRow(f"system message: expected text, found {short(system)}")
    refuse_halves(system, "system message")
    return [{"role": "system", "content": system}, *turns]


def _turn(message: Any, what: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise BadRow(f"{what}: expected role and content, found {short(message)}")
    # Tables store absent fields as null, and templates take a field of tool calls, even null, for tool calls. The
    # content stays: templates ask for it.
    turn = {k: v if k == "content" else _without_nulls(v) for k, v in message.items()}
    turn = {k: v for k, v in turn.items() if k == "content" or (v is not None and (k != "tool_calls" or v))}
    if "from" in turn and "value" in turn:
        names = {"from": "role", "value": "content", "weight": "weight"}
        turn = {names[key]: value for key, value in turn.items() if key in names}
    if turn.get("role") == CALLING:
        turn.update(role="assistant", content=None, tool_calls=_calls(turn.get("content"), what))
    elif CALLING in turn:
        turn["tool_calls"] = _calls(turn.pop(CALLING), what)
    role = turn.get("role")
    turn["role"] = role = OTHER_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise BadRow(f"{what}: role must be one of {', '.join(ROLES)}; found {role!r}")
    if isinstance(turn.get("content"), list | tuple):
        turn["content"] = _text(turn["content"], what)
    content = turn.get("content")
    if not content and not turn.get("tool_calls") and not (content == "" and role in MAY_BE_EMPTY):
        raise BadRow(f"{what} ({role}) has no content")
    if isinstance(content, str):
        refuse_halves(content, what)
    if "tool_calls" in turn:
        turn["tool_calls"] = _with_arguments(turn["tool_calls"], _read)
    return turn


def _text(parts: Sequence[Any], what: str) -> str:
    """Content in parts, which some templates would write as Python shows a list."""
    found = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            raise BadRow(f"{what}: expected text, or parts of type text, found {short(part)}")
        found.append(text)
    return "".join(found)


def _calls(value: Any, what: str) -> list[dict[str, Any]]:
    """Calls of functions as chat templates take them, of one or several with a name and arguments, or their JSON."""
    found = _read(value)
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise BadRow(f"{what}: expected a function's name and arguments, or their JSON, found {short(value)}")
    return [{"type": "function", "function": dict(call)} for call in calls]


def _with_arguments(calls: Any, change: Any) -> Any:
    """The same calls of functions with their arguments changed."""

    def one(call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": one(call["function"])}
        return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call

    return [one(call) for call in calls] if isinstance(calls, list) else calls


def _read(value: Any) -> Any:
    """An object or a list out of its JSON; anything else as it is."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
    return found if isinstance(found, list | dict) else value


def _written(value: Any) -> Any:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def apply_template(tokenizer: Any, turns: Sequence[dict[str, Any]], **options: Any) -> Any:
    """What the chat template makes of messages; whatever it raises is raised.

    Arguments of calls are objects to most templates, which would quote a text once more. To some (DeepSeek's) they are
    a text.
    """
    try:
        return tokenizer.apply_chat_template(list(turns), **options)
    except TypeError:
        texts = [
            {**t, "tool_calls": _with_arguments(t["tool_calls"], _written)} if "tool_calls" in t else t for t in turns
        ]
        if texts == list(turns):
            raise
        return tokenizer.apply_chat_template(texts, **options)


def tools_of(value: Any) -> list[Any] | None:
    """The functions that an assistant may call: a list of their descriptions, or its JSON; None where there are none.

    Raises:
        BadRow: if it is neither.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRow(f"tools: expected a list of functions, or its JSON: {error}") from error
    if not value:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
        raise BadRow(f"tools: expected a list of functions, found {short(value)}")
    found: list[Any] = _without_nulls(value)
    return found


def _without_nulls(value: Any) -> Any:
    """Tables give every call and every function the arguments of all others, as null."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list | tuple) else value


def refuse_halves(text: str, what: str) -> None:
    """JSON can write half of a character (a lone surrogate), which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise BadRow(f"{what}: character {error.start + 1} is {half}, half of one; write it whole") from error


def short(value: Any) -> str:
    """A value for an error's line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
