"""A chat in the terminal: ``doratune generate --chat``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console

from doratune.errors import AdapterError
from doratune.inference.prompts import chat
from doratune.inference.sources import BASE
from doratune.inference.writer import streamer

if TYPE_CHECKING:
    from doratune.inference.sampling import Sampling
    from doratune.inference.writer import Writer

HELP = """/adapter NAME   answer with this adapter from now on; NAME base: with none
/adapters       which there are
/reset          forget what was said
/system TEXT    another system message; forgets what was said
/help           this
/exit           end, as Ctrl-D does; Ctrl-C ends an answer"""


def talk(
    writer: Writer,
    out: Console,
    sampling: Sampling,
    system: str | None = None,
    read: Callable[[str], str] = input,
) -> None:
    """Answer one line after the other, until there are no more."""
    session = _Session(writer, out, sampling, system)
    out.print(f"Answers come from {session.who}. /help lists the commands.", highlight=False, markup=False)
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            return
        if line in ("/exit", "/quit"):
            return
        if line.startswith("/"):
            out.print(session.command(line), highlight=False, markup=False)
        elif line:
            session.answer(line)


class _Session:
    """What was said, and who answers."""

    def __init__(self, writer: Writer, out: Console, sampling: Sampling, system: str | None) -> None:
        self.writer = writer
        self.out = out
        self.sampling = sampling
        self.system = system
        self.adapter = writer.adapters[0] if writer.adapters else None
        self.bare = writer.merged or BASE  # the model that answers without an adapter
        self.said: list[dict[str, str]] = []

    @property
    def who(self) -> str:
        return self.adapter or self.bare

    def command(self, line: str) -> str:
        """Do what a line that begins with / says; the reply."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/adapter" and rest in (self.bare, *self.writer.adapters):
            self.adapter = None if rest == self.bare else rest
            return f"Answers come from {self.who}."
        if name in ("/adapter", "/adapters"):
            there = ", ".join([self.bare, *self.writer.adapters])
            unknown = f"There is no adapter {rest!r}. " if name == "/adapter" and rest else ""
            return f"{unknown}There are: {there}. Answers come from {self.who}."
        if name == "/reset":
            self.said = []
            return "Everything said is forgotten."
        if name == "/system":
            self.said, self.system = [], rest or None
            return f"System message: {rest or 'none'}"
        return HELP if name == "/help" else f"There is no command {name}.\n{HELP}"

    def answer(self, line: str) -> None:
        """Write an answer, and remember it; one that was interrupted, or could not be given, is not remembered."""
        try:
            (completion,) = self.writer.write(
                [chat(line, self.system, self.said)],
                self.sampling,
                self.adapter,
                streamer(self.writer.tokenizer, skip_prompt=True),
            )
        except KeyboardInterrupt:
            self.out.print("\n(interrupted; this message and its answer are forgotten)")
            return
        except AdapterError as error:
            self.out.print(f"{error}\n(/reset forgets what was said)", highlight=False, markup=False)
            return
        self.said += [{"role": "user", "content": line}, {"role": "assistant", "content": completion.text}]
