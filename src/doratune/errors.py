"""The one error a user of doratune has to catch, and the end that Ctrl-C makes."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence


class AdapterError(ValueError):
    """Something a user can put right: a bad option, file, target or model.

    One error lists every problem found, so that nobody mends them one at a time.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = list(problems) or [message]
        """What it lists, to be listed with other problems; where it lists nothing, what it says."""

    @classmethod
    def of(cls, heading: str, problems: Iterable[str], at_most: int | None = None) -> AdapterError:
        """Build one error from a heading and its problems, one line each.

        Args:
            heading: what they are about.
            problems: at least one.
            at_most: of how many the lines are shown, where a single cause makes many; None: of all.
        """
        lines = list(problems)
        if len(lines) == 1:
            return cls(f"{heading}: {lines[0]}", lines)
        shown = lines[:at_most]
        if len(shown) < len(lines):
            shown.append(f"and {len(lines) - len(shown)} more")
        return cls("\n".join([f"{heading} ({len(lines)} problems):", *(f"  - {line}" for line in shown)]), shown)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, as a part of a sentence; its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def shown(value: object) -> str:
    """A value from a file as messages show it; of a long one the beginning and the end."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    return short.repr(value)


class Terminated(KeyboardInterrupt):
    """SIGTERM, where it is heard: ends what Ctrl-C ends."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C after the user was told what is kept and how to resume: print nothing more."""

    def __init__(self, code: int = 130) -> None:
        super().__init__()
        self.code = code
        """Of the program's exit."""


class DivergedError(AdapterError):
    """Training has gone so far off that no later step can bring it back; usually the learning rate is too high."""
