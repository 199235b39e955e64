"""What commands have in common: options that cannot work, and lines that are printed as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console

from doratune.errors import AdapterError


def check(problems: Iterable[str]) -> None:
    """Refuse options that cannot work, and say everything that is wrong with them at once."""
    found = list(problems)
    if found:
        raise AdapterError.of("these options cannot work", found)


def at_least(options: object, **least: int) -> Iterator[str]:
    """Numbers among the options that are too small."""
    for name, smallest in least.items():
        value = getattr(options, name)
        if value < smallest:
            yield f"{name} must be at least {smallest}; found {value}"


def say(console: Console, line: str) -> None:
    """Print a line as it is: names and paths may hold brackets, and are copied from a terminal in one piece."""
    console.out(line, highlight=False)
