"""Which column holds the text, prompt, label, ...: as the options say, or guessed from usual names."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from doratune.errors import AdapterError
from doratune.train.config import TrainConfig
from doratune.train.prompt_template import fields_of

GUESSES = {
    "messages": ("messages", "conversations", "conversation", "chat", "dialog"),
    "prompt": ("prompt", "instruction", "question", "query", "input"),
    "completion": ("completion", "response", "output", "answer", "chosen"),
    "text": ("text", "content", "sentence", "review", "document", "body"),
    "label": ("label", "labels", "class", "category", "target", "sentiment", "y"),
    "image": ("image", "img", "picture", "file_name", "filename", "file", "path", "image_path"),
}
PARTS_OF_PROMPTS = ("system_prompt", "system", *GUESSES["prompt"], "context")
"""Columns that make up a prompt, in the order in which they are usually put together."""
AT_MOST = 6
"""Columns passed over that are named."""


def choose(
    config: TrainConfig, names: Collection[str], roles: Collection[str], where: str, optional: Collection[str] = ()
) -> dict[str, str]:
    """Find the column of each role.

    Args:
        config: says some of the columns.
        names: the columns that there are.
        roles: what is looked for: keys of ``GUESSES``.
        where: named in errors.
        optional: roles that may be without a column, if none was said.

    Raises:
        AdapterError: listing every role without a column.
    """
    problems, found = [], {}
    for role in (*roles, *optional):
        flag = f"{role}_column"
        given = getattr(config, flag)
        guess = next((name for name in GUESSES[role] if name in names), None)
        if given is not None and given not in names:
            problems.append(f"{flag} {given!r} is not among the columns ({listed(names)})")
        elif given is None and guess is None and role in optional:
            continue
        elif given is None and guess is None:
            problems.append(f"no column looks like the {role} among {listed(names)}; name it with {as_flag(flag)}")
        else:
            found[role] = given or str(guess)
    if problems:
        raise AdapterError.of(where, problems)
    return found


def roles_of_text(config: TrainConfig, names: Collection[str], where: str) -> dict[str, str]:
    """Whether rows are documents, prompts with completions, or chats, and in which columns.

    Raises:
        AdapterError: if the names do not tell, or tell half of a prompt.
    """
    found = _roles_of_text(config, names, where)
    if problem := half_of(found, names, config):
        raise AdapterError(f"{where}: {problem}")
    return found


def _roles_of_text(config: TrainConfig, names: Collection[str], where: str) -> dict[str, str]:
    if config.messages_column:
        return choose(config, names, ["messages"], where)
    if config.prompt_template:
        _check_template(config.prompt_template, names, where)
        return choose(config, names, ["completion"], where)
    if config.prompt_column or config.completion_column:
        return choose(config, names, ["prompt", "completion"], where)
    if config.text_column:
        return choose(config, names, ["text"], where)
    for roles in (["messages"], ["prompt", "completion"], ["text"]):
        if all(any(name in names for name in GUESSES[role]) for role in roles):
            return choose(config, names, roles, where)
    raise AdapterError(
        f"{where}: no column looks like a text, a prompt with completion, or a chat among {listed(names)}; name "
        "them with --text-column, with --prompt-column and --completion-column, or with --messages-column"
    )


def half_of(found: dict[str, str], names: Collection[str], config: TrainConfig) -> str | None:
    """What to say where a guessed prompt may be half of what these columns hold; None: it is whole."""
    if "prompt" not in found or config.prompt_column:
        return None
    parts = [name for name in PARTS_OF_PROMPTS if name in names and name != found["completion"]]
    return half_a_prompt(found["prompt"], parts) if len(parts) > 1 else None


def half_a_prompt(column: str, parts: Collection[str]) -> str:
    """What to say where a prompt's column has others beside it that usually belong to it."""
    others = ", ".join(repr(name) for name in parts if name != column)
    template = "".join(f"{{{name}}}\\n" for name in parts)
    return (
        f"the prompt could be {column!r} alone or together with {others}; say which: "
        f'--prompt-template "{template}", or --prompt-column {column} to leave the rest out'
    )


def _check_template(template: str, names: Collection[str], where: str) -> None:
    try:
        fields = fields_of(template)
    except ValueError as error:
        raise AdapterError(f"prompt_template {template!r}: {error}; double braces that are text") from error
    absent = [field for field in fields if field not in names]
    if absent:
        raise AdapterError(
            f"{where}: prompt_template asks for {', '.join(map(repr, absent))}; the columns are {listed(names)}"
        )


def listed(names: Collection[str]) -> str:
    """Names of columns in words; a single one that looks like a whole header line gets a word about separators."""
    said = ", ".join(names)
    if len(names) == 1 and (found := next((sign for sign in ";\t" if sign in said), None)):
        said = f"{said!r} (one name with {found!r} in it: fields are separated by commas, in .tsv files by tabs)"
    return said


def as_flag(name: str) -> str:
    """An option's name as it is typed."""
    return "--" + name.replace("_", "-")


def described(
    columns: dict[str, str], config: TrainConfig, names: Iterable[str] = (), also: Collection[str] = ()
) -> str:
    """The choice in words, with what was guessed, and which of these names are passed over.

    Args:
        columns: by role.
        config: says which of them were named.
        names: the columns that there are.
        also: columns that are used without a role.
    """
    parts = []
    for role, name in columns.items():
        guessed = getattr(config, f"{role}_column") is None
        parts.append(f"{role} = {name!r}" + (" (guessed)" if guessed else ""))
    rest = [name for name in names if name not in (*columns.values(), *also)]
    more = [f"and {len(rest) - AT_MOST} more"] if len(rest) > AT_MOST else []
    passed_over = "; passed over: " + ", ".join([*map(repr, rest[:AT_MOST]), *more]) if rest else ""
    return ", ".join(parts) + passed_over
