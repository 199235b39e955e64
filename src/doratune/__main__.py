"""``python -m doratune`` is the ``doratune`` command."""

import sys

if __name__ == "__main__":
    try:
        from doratune.cli import main
    except KeyboardInterrupt:  # imports take a moment; from then on main says it
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(main())
