"""``python -m doratune`` is the ``doratune`` command."""

import sys

from doratune.cli import main

if __name__ == "__main__":
    sys.exit(main())
