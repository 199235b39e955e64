"""How much memory a run takes at its highest level."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


def peak_bytes(run: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Most memory that was allocated at any moment of a run, above what was allocated before it.

    On a GPU that is the allocator's own statistics. On a CPU torch's profiler reports every allocation and release,
    temporary ones inside operators too; resident memory of the process would also hold what the C library keeps.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    # There is one cycle only; torch 2.10 warns about others unless they are to be added up.
    profiler = torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True)
    with _no_profiler_notes(), profiler as profile:
        result = run()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    level = highest = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        level += change
        highest = max(highest, level)
    return highest


@contextlib.contextmanager
def _no_profiler_notes() -> Iterator[None]:
    """The profiler announces itself on the process's stderr, past Python's."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
