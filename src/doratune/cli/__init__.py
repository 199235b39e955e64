"""The ``doratune`` command: one file per command, flags from dataclasses.

Exit codes: 0, 1 for failures, 2 for wrong usage, 130 after Ctrl-C, 143 after SIGTERM where that is heard,
141 if nobody reads the output any more.
transformers is imported only by the command that needs it.
"""

from __future__ import annotations

import logging
import os
import select
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from doratune import __version__
from doratune.cli import (
    analyze,
    bench,
    compare,
    convert,
    estimate,
    evaluate,
    generate,
    inspect,
    merge,
    nothing,
    predict,
    train,
)
from doratune.errors import AdapterError, Interrupted
from doratune.train.config import TrainConfig

RUNNERS: dict[type, Any] = {
    TrainConfig: train.run,
    generate.Generate: generate.run,
    predict.Predict: predict.run,
    evaluate.Evaluate: evaluate.run,
    merge.Merge: merge.run,
    convert.Convert: convert.run,
    inspect.Inspect: inspect.run,
    analyze.Analyze: analyze.run,
    bench.Bench: bench.run,
    compare.Compare: compare.run,
    estimate.EstimateOptions: estimate.run,
}
"""What each command's options are handed to; it returns the exit code."""


@dataclass
class Program:
    """DoRA fine-tuning: train adapters on language and vision models, use, measure, look at, merge and convert them.

    doratune --version tells the version.
    """

    command: (
        Annotated[TrainConfig, tyro.conf.subcommand("train")]
        | Annotated[generate.Generate, tyro.conf.subcommand("generate")]
        | Annotated[predict.Predict, tyro.conf.subcommand("predict")]
        | Annotated[evaluate.Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[merge.Merge, tyro.conf.subcommand("merge")]
        | Annotated[convert.Convert, tyro.conf.subcommand("convert")]
        | Annotated[inspect.Inspect, tyro.conf.subcommand("inspect")]
        | Annotated[analyze.Analyze, tyro.conf.subcommand("analyze")]
        | Annotated[compare.Compare, tyro.conf.subcommand("compare")]
        | Annotated[bench.Bench, tyro.conf.subcommand("bench")]
        | Annotated[estimate.EstimateOptions, tyro.conf.subcommand("estimate")]
    )
    debug: bool = False
    """Show the whole traceback of an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; wrong usage raises SystemExit(2), ``--help`` SystemExit(0)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.ERROR)
    logging.getLogger("doratune").setLevel(logging.WARNING)
    try:
        code = _run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()  # not at the interpreter's end, where nobody catches what it raises
        return code
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        _write_nowhere()
        return 141  # whoever read the output has seen enough, as head does
    except OSError as error:
        if "--debug" in arguments:
            raise
        _write_nowhere()
        return _fail(f"the output cannot be written: {error.strerror or error}")
    except Interrupted as stop:
        return stop.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print(f"doratune {__version__}")
        return 0
    try:
        program = _parse(arguments)
    except AdapterError as error:  # a recipe that cannot be read
        return _fail(error)
    try:
        more = (train.flags_among(arguments),) if isinstance(program.command, TrainConfig) else ()
        code: int = RUNNERS[type(program.command)](program.command, *more)
        return code
    except AdapterError as error:
        if program.debug:
            raise
        return _fail(error)
    except Exception as error:
        if program.debug or (isinstance(error, BrokenPipeError) and _nobody_reads()):
            raise
        return _fail(f"{type(error).__name__}: {error}\n(doratune --debug ... shows where)")


def _write_nowhere() -> None:
    """What is still in stdout's buffer would fail again at the interpreter's end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _nobody_reads() -> bool:
    """Whether it is stdout that broke, and not some pipe between a run's processes."""
    if sys.stdout is None:
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))


def _parse(arguments: list[str]) -> Program:
    with nothing.registry:
        defaults = train.from_recipe(arguments)
        return tyro.cli(
            Program,
            prog="doratune",
            args=arguments,
            default=tyro.MISSING_NONPROP if defaults is None else Program(defaults),
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
        )


def _fail(error: object) -> int:
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" in process {rank}"
    print(f"error{where}: {error}", file=sys.stderr)
    return 1
