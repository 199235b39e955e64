"""Workers in processes of their own, on one study."""

import sys
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from doratune.study.comparison import recipe, storage
from doratune.study.comparison.run import run_all

HEARTBEAT, GRACE = 1, 4


def opened(folder: Path, of: Any) -> Any:
    """The study in a folder, of workers that count as killed soon."""
    return storage.open_study(storage.database(folder / "study.db"), "compare", of, HEARTBEAT, GRACE)


def work(name: str, folder: Path) -> None:
    """What ``doratune compare`` does with a recipe."""
    if sys.version_info < (3, 14):  # Python would start another server beside the one that forked this process
        forkserver._forkserver.ensure_running = lambda: None
    of = recipe.load(name)
    run_all(of, lambda: opened(folder, of), folder)
