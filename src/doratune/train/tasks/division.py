"""Examples with labels divided into those to train on, to measure on and to test on."""

from __future__ import annotations

from typing import Any

from doratune.errors import AdapterError
from doratune.train.config import TrainConfig
from doratune.train.gather import Say, set_aside
from doratune.train.labels import ordered, refuse_unknown
from doratune.train.start import classes


def divided(
    found: list[Any], others: list[Any] | None, test: list[Any] | None, config: TrainConfig, say: Say
) -> tuple[tuple[str, ...], list[Any], list[Any], list[Any]]:
    """The classes, and the examples of each part; a part that is None is set aside from those to train on.

    Raises:
        AdapterError: if there are fewer than two classes, a part has others, or nothing is left to measure on.
    """
    names = classes(config, ordered(one.label for one in found), say)
    if test is None:
        found, test = set_aside(found, config.test_fraction, lambda one: names.index(one.label))
    if others is None:
        found, others = set_aside(found, config.eval_fraction, lambda one: names.index(one.label))
    for option, part in (("eval_data", others), ("test_data", test)):
        refuse_unknown({one.label for one in part}, names, option)
    if not others or (config.test_fraction and not test):
        raise AdapterError(
            f"no class has an example to spare ({len(found)} examples of {len(names)} classes, such as {names[0]!r}): "
            "at least one to train on and one to measure on are needed; give more examples, or others to measure on "
            "with --eval-data (--test-data). Quantities are no classes"
        )
    return names, found, others, test
