"""How long this process was kept waiting by others, so that a race can leave out such rounds."""

from __future__ import annotations

from pathlib import Path

THREADS = Path("/proc/self/task")


def seconds_kept_waiting() -> float:
    """Time that this process's threads, together, have so far been ready to run while others had the processors.

    Linux tells (``schedstat``); elsewhere it is always 0.
    """
    waited = 0
    try:
        for thread in THREADS.iterdir():
            waited += int((thread / "schedstat").read_text().split()[1])
    except (OSError, IndexError, ValueError):  # not Linux, not told, or a thread that has just ended
        return 0.0
    return waited / 1e9
