"""What can be learnt: one file a task.

Each has ``problems(config)``, ``prepare(config, say)`` for a run, and ``to_measure(...)``, which makes of ``data`` what
the run makes of held-out data, for a model that is there already.
"""

from __future__ import annotations

from types import ModuleType

from doratune.train.tasks import classification, image, text

_TASKS = {"text-generation": text, "text-classification": classification, "image-classification": image}


def task_of(name: str) -> ModuleType:
    """The module of a task."""
    return _TASKS[name]
