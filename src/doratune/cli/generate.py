"""``doratune generate``: what a language model writes, with its adapters and without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from doratune.cli.common import check, say
from doratune.errors import AdapterError
from doratune.hub import adapter_folder
from doratune.inference.loading import AUTO, Loading, QuantizeToUse
from doratune.inference.sampling import Sampling
from doratune.inference.sources import find_sources
from doratune.train.checks import quantize_problems
from doratune.train.choices import Dtype
from doratune.train.quiet import quiet_libraries

if TYPE_CHECKING:
    from doratune.inference.prompts import Prompt
    from doratune.inference.writer import Completion, Writer


@dataclass
class Generate:
    """Let a language model write: continue a prompt, answer a chat, or work through a file of prompts.

    With several adapters each of them writes; in a chat they are switched with /adapter NAME.
    """

    adapters: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[ADAPTER ...]")] = ()
    """Adapters, as written by doratune or PEFT: folders, or names on the hub; or the folder of one whole model."""
    base: str | None = None
    """Base model, a folder or hub name; none: the one that the adapters name."""
    prompt: str | None = None
    """Text to be continued; with --chat, a message to be answered."""
    file: Path | None = None
    """Prompts: a text file with one a line, or .jsonl and other tables with a column prompt or messages."""
    prompt_column: str | None = None
    """Column of the prompt in a table; none: messages, prompt, instruction, ... as in training."""
    prompt_template: str | None = None
    """Prompt made of a table's columns, such as "Question: {question}\\nAnswer: "; none: the one that the adapters were
    trained with, where the table has its columns."""
    chat: bool = False
    """Use the model's chat template; without prompt and file, talk with the model."""
    system: str | None = None
    """System message of a chat."""
    compare: bool = False
    """Let the base model write, too, and show both side by side."""
    sampling: Annotated[Sampling, tyro.conf.OmitArgPrefixes] = field(default_factory=Sampling)
    """How tokens are chosen."""
    batch_size: int = 8
    """Prompts of a file at a time."""
    dtype: Dtype = "auto"
    """Of the base weights; auto: as in training, else bfloat16 on a GPU that has it, else float32."""
    quantize: QuantizeToUse = "auto"
    """Load the base in 4 or 8 bits; auto: as in training; none: in full precision."""
    merge: bool = False
    """Put the adapter into the weights first: the fastest way to write much. Takes a single adapter."""
    json: bool = False
    """Print one JSON object per text: prompt or messages, adapter, text, tokens, ended."""

    def problems(self) -> Iterator[str]:
        """Options that do not go together."""
        talking = self.chat and self.prompt is None and self.file is None
        if self.prompt is None and self.file is None and not self.chat:
            yield "give a --prompt, a --file of prompts, or --chat"
        if self.prompt is not None and self.file is not None:
            yield "give a prompt or a file, not both"
        if self.prompt_column is not None and self.prompt_template is not None:
            yield "give a prompt_column or a prompt_template, not both"
        if self.file is None and (self.prompt_column is not None or self.prompt_template is not None):
            yield "prompt_column and prompt_template are for a --file that is a table"
        if self.prompt == "":
            yield "prompt is empty"
        if talking and (self.compare or self.json):
            yield "compare and json need a --prompt or a --file; in a chat, switch with /adapter"
        if self.system is not None and not self.chat:
            yield "system is for chats; add --chat"
        if self.compare and self.merge:
            yield "a merged adapter cannot be compared with the base; leave out --compare or --merge"
        if self.quantize not in (AUTO, None) and self.merge:
            yield "merging needs the base's weights whole; leave out --quantize or --merge"
        yield from quantize_problems(self.quantize)
        if self.batch_size < 1:
            yield f"batch_size must be above 0; found {self.batch_size}"
        yield from self.sampling.problems()


def run(options: Generate) -> int:
    """Check, load, write."""
    from doratune.cli.chat import talk
    from doratune.inference.prompts import Prompt, PromptColumns, chat, read_prompts
    from doratune.inference.writer import Writer

    check(options.problems())
    sources = find_sources([str(adapter_folder(name)) for name in options.adapters], options.base)
    if options.compare and not sources.adapters:
        raise AdapterError("compare needs an adapter; found the base model only")
    prompts: list[Prompt] = []
    if options.file is not None:
        trained = [*sources.adapters.values()] or [Path(sources.base)]
        columns = PromptColumns.of(trained, options.prompt_column, options.prompt_template)
        prompts = read_prompts(options.file, options.chat, options.system, columns)
    elif options.prompt is not None:
        prompts = [chat(options.prompt, options.system) if options.chat else Prompt(options.prompt)]
    quiet_libraries()
    status = Console(stderr=True, emoji=False)
    if told := Loading.choose(sources.noted(), options.dtype, options.quantize, options.merge).told:
        say(status, told)
    with status.status(Text(f"Loading {sources.base}")):
        writer = Writer.load(sources, options.dtype, options.merge, options.quantize)
        writer.check(prompts)
    out = Console(emoji=False)
    if not prompts:
        talk(writer, out, options.sampling, options.system)
        return 0
    names: list[str | None] = [None] if options.compare else []
    names += writer.adapters or [None]
    if options.json:
        for group in _groups(writer, prompts, names, options):
            for completion in group:
                print(_record(completion), flush=True)
    elif len(prompts) == len(names) == 1:
        _stream(writer, prompts[0], names[0], options.sampling)
    else:
        for group in _groups(writer, prompts, names, options):
            _show(out, group, several=len(prompts) > 1)
    return 0


def _groups(
    writer: Writer, prompts: list[Prompt], names: list[str | None], options: Generate
) -> Iterator[tuple[Completion, ...]]:
    """What was written after each prompt, by everyone who was asked; in batches."""
    for start in range(0, len(prompts), options.batch_size):
        batch = prompts[start : start + options.batch_size]
        sampling = options.sampling.later(start)
        yield from zip(*(writer.write(batch, sampling, name) for name in names), strict=True)


def _record(completion: Completion) -> str:
    found = {
        **completion.prompt.as_json(),
        "adapter": completion.adapter,
        "text": completion.text,
        "tokens": completion.tokens,
        "ended": completion.ended,
    }
    return json.dumps(found, ensure_ascii=False)


def _stream(writer: Writer, prompt: Prompt, name: str | None, sampling: Sampling) -> None:
    """Every word as soon as it is there; a prompt to be continued is shown before it."""
    from doratune.inference.writer import streamer

    writer.write([prompt], sampling, name, streamer=streamer(writer.tokenizer, prompt.messages is not None))


def _show(out: Console, group: tuple[Completion, ...], several: bool) -> None:
    """Completions of one prompt: side by side, or after it where there is only one."""
    from doratune.inference.writer import label

    prompt = Text(group[0].prompt.shown(), style="bold")
    if len(group) == 1:
        between = "" if group[0].prompt.messages is None else "\n"
        out.print(prompt, Text(group[0].text), sep=between, soft_wrap=True)  # files have no width
    else:
        table = Table(title=prompt, title_justify="left", expand=True)
        for completion in group:
            table.add_column(label(completion.adapter), ratio=1, overflow="fold")
        table.add_row(*(Text(completion.text.strip()) for completion in group))
        out.print(table)
    if several:
        out.print()
