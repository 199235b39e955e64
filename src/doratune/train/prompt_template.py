"""A prompt made of several columns: ``"Question: {question}\\nAnswer: "``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from string import Formatter
from typing import Any

from doratune.train.gather import BadRow


def fields_of(template: str) -> list[str]:
    """The columns that a template asks for.

    Raises:
        ValueError: if it is no template, such as one with a single brace.
    """
    fields = [re.split(r"[.\[]", field)[0] for _, field, _, _ in Formatter().parse(template) if field is not None]
    return list(dict.fromkeys(fields))


def filled(template: str, values: Mapping[str, Any]) -> str:
    """The prompt of a row. ``\\n`` may be written in two letters, as one types it in a shell.

    Raises:
        BadRow: if a column is absent, or holds a list or an object.
    """
    try:
        return _Filled().vformat(template.replace("\\n", "\n"), (), values)
    except BadRow:
        raise
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise BadRow(f"prompt_template cannot be filled: {type(error).__name__}: {error}") from error


class _Filled(Formatter):
    """Fills a template with texts and numbers; null is no text."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        value, first = super().get_field(field_name, args, kwargs)
        if isinstance(value, list | tuple | Mapping):
            kind = "an object" if isinstance(value, Mapping) else "a list"
            raise BadRow(
                f"prompt_template: {field_name!r} is {kind}, expected text; name a part: {{{field_name}[...]}}"
            )
        return "" if value is None else value, first
