"""Chats from the tales of the brothers Grimm: `python examples/tale_chats.py tale-chats.jsonl`.

A user shows a passage of a tale and the assistant goes on, twice: real text in the form that chat models learn from.
Every line is an object, `{"messages": [{"role": ..., "content": ...}, ...]}`, as `doratune train --data` takes it.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import tyro

from assets import AssetError, grimm_tales

WORDS = 60
"""A passage ends with the sentence in which it reaches so many."""


def chats(tales: str) -> Iterator[list[dict[str, str]]]:
    """Three passages a chat: the one that is shown, and two answers. What is left at the end of a tale is not used."""
    for tale in tales.split("\n\n\n"):
        title, _, text = tale.strip().partition("\n\n")
        parts = passages(text)
        for shown, answer, further in zip(parts[::3], parts[1::3], parts[2::3], strict=False):
            yield [
                {"role": "user", "content": f"Go on with the tale “{title}”:\n\n{shown}"},
                {"role": "assistant", "content": answer},
                {"role": "user", "content": "And then?"},
                {"role": "assistant", "content": further},
            ]


def passages(text: str) -> list[str]:
    """Whole sentences, joined until there are enough words."""
    found, own = [], ""
    for sentence in re.split(r"(?<=[.!?’])\s+(?=[A-Z‘])", text):
        own = f"{own} {sentence}".strip()
        if len(own.split()) >= WORDS:
            found.append(own)
            own = ""
    return found


def main(output: tyro.conf.Positional[Path]) -> None:
    """Write the chats.

    Args:
        output: JSONL file to write.
    """
    lines = [json.dumps({"messages": chat}, ensure_ascii=False) for chat in chats(grimm_tales().read_text("utf-8"))]
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} chats written to {output}")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except AssetError as error:
        sys.exit(f"error: {error}")
