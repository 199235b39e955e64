"""``python -m doratune`` is the ``doratune`` command."""

import sys


def main() -> int:
    """Run the command line; Ctrl-C is no traceback while it is still being imported, either."""
    try:
        from doratune.cli import main as run
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
