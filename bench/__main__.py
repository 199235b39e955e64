"""`python -m bench layer | step | decode | eval | files | memory | experts | losses | profile | all`."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, fields
from typing import Annotated

import tyro

from bench import needed  # noqa: F401
from bench.decode import Decode, Eval
from bench.experts import Experts
from bench.files import Files
from bench.layer import Layer
from bench.losses import Losses
from bench.memory import Memory
from bench.options import Benchmark, Options
from bench.profile import Profile
from bench.step import Step
from doratune.cli import nothing

PARTS: tuple[type[Benchmark], ...] = (Layer, Step, Decode, Eval, Files, Memory, Experts, Losses, Profile)


@dataclass
class All(Options):
    """Everything, one after the other; results are written after each point."""

    seconds: float | None = None  # type: ignore[assignment]
    """Length of each race; none: what each benchmark takes by itself."""

    def run(self) -> None:
        """Run every benchmark."""
        shared = {field.name: getattr(self, field.name) for field in fields(Options)}
        if self.seconds is None:
            del shared["seconds"]
        for part in PARTS:
            part(**shared).run()


Command = (
    Annotated[Layer, tyro.conf.subcommand("layer")]
    | Annotated[Step, tyro.conf.subcommand("step")]
    | Annotated[Decode, tyro.conf.subcommand("decode")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Files, tyro.conf.subcommand("files")]
    | Annotated[Memory, tyro.conf.subcommand("memory")]
    | Annotated[Experts, tyro.conf.subcommand("experts")]
    | Annotated[Losses, tyro.conf.subcommand("losses")]
    | Annotated[Profile, tyro.conf.subcommand("profile")]
    | Annotated[All, tyro.conf.subcommand("all")]
)


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    warnings.simplefilter("ignore")  # other libraries, about themselves
    for name in ("LyCORIS", "torchao", "torch.utils._pytree", "transformers", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    settings = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    with nothing.registry:
        command = tyro.cli(Command, prog="python -m bench", args=arguments, config=settings)
    command.run()


if __name__ == "__main__":
    main()
