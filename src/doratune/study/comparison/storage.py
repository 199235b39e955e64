"""The Optuna study that holds a comparison: opened by any number of workers, on any number of machines."""

from __future__ import annotations

import itertools
import json
import re
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from doratune.errors import AdapterError, first_line
from doratune.extras import require
from doratune.study.comparison.contestants import RANKED, UNRANKED
from doratune.study.comparison.recipe import CONTENT, Comparison
from doratune.study.comparison.trials import Outcome, Trial

HEARTBEAT, GRACE = 10, 60
"""Seconds between heartbeats of a running trial, and without one until its worker counts as killed."""
AHEAD = 8
"""So many runs wait at a time: Optuna reads every one that is not over whenever it is asked."""
TRIES = 6
"""To create the tables: two workers that do so at the same moment get in each other's way."""
RATES = ("compare.learning_rates", "compare.learning_rates_of")
"""Options of a recipe's identity."""
RECIPE, RESULT, PROBLEM, KILLED = "recipe", "result", "problem", "killed"
"""Attributes of the study and of its trials."""


def database(file: Path) -> str:
    """URL of an SQLite file.

    Raises:
        AdapterError: if no URL names it: SQLAlchemy 2.0, which is Python 3.10's, knows no way to write a question mark.
    """
    make_url = require("sqlalchemy.engine", "study").make_url
    path = str(file.absolute())
    for written in (path, path.replace("%", "%25").replace("?", "%3F")):  # SQLAlchemy 2.1 decodes a URL, 2.0 does not
        url = f"sqlite:///{written}"
        if make_url(url).database == path:
            return url
    raise AdapterError(f"{path}: a study cannot lie in a folder with a ? in its name here; name another")


def open_study(url: str, name: str, comparison: Comparison, heartbeat: int = HEARTBEAT, grace: int = GRACE) -> Any:
    """Open the study, or create it.

    Args:
        url: of an Optuna storage.
        name: of the study within the storage.
        comparison: what is compared.
        heartbeat: seconds between heartbeats.
        grace: seconds without one until a trial counts as lost.

    Raises:
        AdapterError: if the storage cannot be used, or the study is of another recipe, listing what differs.
    """
    optuna = require("optuna", "study")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    direction = "maximize" if comparison.by_accuracy else "minimize"
    for attempt in range(1, TRIES + 1):
        try:
            storage = _storage(optuna, url, heartbeat, grace)
            study = optuna.create_study(storage=storage, study_name=name, direction=direction, load_if_exists=True)
            break
        except Exception as error:  # of SQLAlchemy, of the database's driver, or that the driver is missing
            if attempt == TRIES or isinstance(error, ImportError):
                raise AdapterError(f"storage {_without_password(url)} cannot be used: {first_line(error)}") from error
            time.sleep(0.2 * attempt)
    mine = comparison.identity()
    theirs = study.user_attrs.get(RECIPE)
    if theirs is None or _adds_rates(theirs, mine):
        study.set_user_attr(RECIPE, mine)
    elif theirs != mine and _only_failed(study):
        # All that was tried ended with a mistake in the recipe, such as a column that is not there; it was corrected.
        optuna.delete_study(study_name=name, storage=storage)
        return open_study(url, name, comparison, heartbeat, grace)
    elif theirs != mine:
        what = f"study {name!r} in {_without_password(url)} is of another recipe"
        raise AdapterError.of(
            f"{what}: name another --output or --study, or undo the change", _differences(theirs, mine)
        )
    return study


def refuse_changed_data(study: Any, comparison: Comparison) -> None:
    """Data that changed since the study was opened: what a run has found on them is of another comparison.

    Raises:
        AdapterError: listing the data.
    """
    theirs, mine = study.user_attrs[RECIPE], comparison.identity()
    changed = {key: value for key, value in mine.items() if key.startswith(CONTENT) and value != theirs.get(key)}
    if changed:
        what = "data changed while the comparison was going on: name another --output or --study, or undo the change"
        raise AdapterError.of(what, _differences({key: theirs.get(key) for key in changed}, changed))


def _only_failed(study: Any) -> bool:
    """Whether runs have failed, none is over, and none is being done."""
    states = require("optuna").trial.TrialState
    found = {one.state for one in study.get_trials(deepcopy=False)}
    return states.FAIL in found and states.RUNNING not in found and not outcomes(study)


def _adds_rates(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> bool:
    """Whether the recipes differ only in learning rates that mine tries besides theirs.

    None can be taken away again: that would be to leave out what was seen.
    """
    if theirs == mine or any(theirs.get(key) != mine.get(key) for key in {*theirs, *mine} - set(RATES)):
        return False
    both, of_methods = RATES
    return all(
        set(theirs[of_methods].get(method, theirs[both])) <= set(mine[of_methods].get(method, mine[both]))
        for method in (*RANKED, *UNRANKED)
    )


def _storage(optuna: Any, url: str, heartbeat: int, grace: int) -> Any:
    sqlite = url.startswith("sqlite")
    # A connection kept for the next question would be closed by nobody.
    pool = require("sqlalchemy.pool", "study").NullPool
    options = {"connect_args": {"timeout": 60}, "poolclass": pool} if sqlite else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of heartbeats
        storage = optuna.storages.RDBStorage(
            url, engine_kwargs=options, heartbeat_interval=heartbeat, grace_period=grace
        )
    if sqlite:
        # Optuna hands out a trial by reading its state and then writing it. Other databases lock the row between the
        # two (SELECT FOR UPDATE); SQLite has no such lock, and two workers would do the same run.
        begin = require("sqlalchemy.event").listens_for(storage.engine, "begin")
        begin(lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return storage


def _without_password(url: str) -> str:
    return re.sub(r"(://[^/@:]+):[^@]*@", r"\1:***@", url)


def _differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} was {json.dumps(theirs.get(key))}, is {json.dumps(mine.get(key))}"
        for key in dict.fromkeys((*theirs, *mine))
        if theirs.get(key) != mine.get(key)
    ]


def fail_lost(study: Any, watched: set[int]) -> None:
    """Fail the runs whose workers were killed: they have sent no heartbeat for the grace period.

    Optuna overlooks a run without any heartbeat: its worker was killed between taking it and sending one. So one is
    recorded for every run that is seen for the first time; ``watched`` holds the numbers of those already seen.
    """
    optuna = require("optuna")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
    for one in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        if one.number not in watched:
            study._storage.record_heartbeat(one._trial_id)
            watched.add(one.number)


def trial_of(params: Mapping[str, Any]) -> Trial | None:
    """The run that a trial's parameters stand for; None if it has none: asked for when nothing was waiting."""
    return Trial(**params) if params else None


def live(study: Any) -> dict[Trial, Any]:
    """Optuna's trial of each run that is waiting, running or over; the first where two workers have added one."""
    states = require("optuna").trial.TrialState
    found: dict[Trial, Any] = {}
    for one in study.get_trials(deepcopy=False):
        known = trial_of(one.params)
        counts = one.state in (states.WAITING, states.RUNNING, states.COMPLETE) or PROBLEM in one.user_attrs
        if known is not None and counts:
            found.setdefault(known, one)
    return found


def outcomes(study: Any) -> list[Outcome]:
    """Runs that are over, in the order they were added."""
    return [
        Outcome(trial, one.user_attrs.get(RESULT), one.user_attrs.get(PROBLEM))
        for trial, one in live(study).items()
        if RESULT in one.user_attrs or PROBLEM in one.user_attrs
        if one.state.is_finished()
    ]


def add(study: Any, comparison: Comparison, trials: Iterable[Trial]) -> None:
    """Let the next of these runs wait for a worker; the others follow when those are taken."""
    optuna = require("optuna")
    kinds = optuna.distributions
    distributions = {
        "stage": kinds.CategoricalDistribution(("sweep", "test")),
        "contestant": kinds.CategoricalDistribution(tuple(one.key for one in comparison.contestants)),
        "learning_rate": kinds.FloatDistribution(1e-12, 1e3, log=True),
        "seed": kinds.IntDistribution(0, 2**31 - 1),
    }
    there, waiting = live(study), optuna.trial.TrialState.WAITING
    ahead = sum(one.state == waiting for one in there.values())
    for trial in itertools.islice((one for one in trials if one not in there), max(0, AHEAD - ahead)):
        study.add_trial(
            optuna.trial.create_trial(state=waiting, params=vars(trial).copy(), distributions=distributions)
        )
