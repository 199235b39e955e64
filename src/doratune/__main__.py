"""``python -m doratune`` is the ``doratune`` command."""

import atexit
import os
import sys


def main() -> int:
    """Run the command line; Ctrl-C is no traceback while it is still being imported, either."""
    try:
        from doratune.cli import main as run
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    code = run()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _end(code)
    return code


def _end(code: int) -> None:
    """End one of several processes without taking the interpreter down.

    A thread of gloo's may hold tensors of the last collective still. Where it drops them while the interpreter ends, it
    aborts the process, and torchrun calls the whole run failed (pytorch/pytorch#179291).
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
