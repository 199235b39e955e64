"""The folder that a command writes: a new one, there when it is whole or not at all."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from doratune.errors import AdapterError, first_line
from doratune.files import output_problem
from doratune.train.failures import tells_of_no_room


def problem_of_new(output: Path) -> str | None:
    """Why the folder cannot be made, or that something is in it; asked before anything large is loaded."""
    if problem := output_problem(output):
        return problem
    if output.exists() and any(output.iterdir()):
        return f"output {output} exists and is not empty; name a new folder"
    return None


@contextlib.contextmanager
def new_folder(output: Path, what: str) -> Iterator[Path]:
    """A folder beside the output, which takes its name at the end: a broken attempt leaves nothing behind.

    Raises:
        AdapterError: if it cannot be written.
    """
    from safetensors import SafetensorError

    partial = output.parent / f".{output.name}.{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.replace(output)
    except (OSError, SafetensorError, AdapterError) as raised:
        error = raised.__cause__ or raised  # save_adapter's own message names the folder beside
        if not isinstance(error, OSError | SafetensorError):
            raise
        reason = error.strerror if isinstance(error, OSError) else None
        said = f"cannot write {what} to {output}: {reason or first_line(error)}"
        if tells_of_no_room(error):
            said += ". Make room, or name an output on another disk"
        raise AdapterError(said) from raised
    finally:
        shutil.rmtree(partial, ignore_errors=True)
