"""Doing the runs: workers take them from the study one after the other until none is left."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import platform
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from doratune.errors import AdapterError, DivergedError, first_line
from doratune.extras import require
from doratune.study.comparison import storage, trials
from doratune.study.comparison.process import KilledError, train_apart
from doratune.study.comparison.recipe import Comparison
from doratune.study.comparison.trials import Outcome, Trial

ATTEMPTS = 3
"""After so many a run that is killed again and again ends the comparison."""
POLL = 1.0
"""Seconds between looks at the study while others have the last runs."""
UNINTERESTING = ("labels", "prompt", "sample_before", "sample_after", "adapter")
"""Fields of a run's result that are not kept."""
RUNS = "runs"
"""Folder within the output, for what is being trained; in it one for each study."""
Watch = Callable[[list[Outcome], int, int], None]
"""Called with the runs that are over, how many there are in all, and how many others are doing."""


@dataclass
class Worker:
    """One of several that share a study; each does a run at a time."""

    comparison: Comparison
    study: Any
    output: Path
    number: int = 0
    workers: int = 1
    stopped: threading.Event = dataclasses.field(default_factory=threading.Event)
    watched: set[int] = dataclasses.field(default_factory=set)
    """Numbers of runs that others were seen doing."""

    def work(self) -> None:
        """Do runs until the comparison is complete or ``stopped`` is set.

        Raises:
            AdapterError: if a run cannot be done for a reason that another learning rate would not mend.
        """
        states = require("optuna").trial.TrialState
        while not self.stopped.is_set():
            storage.fail_lost(self.study, self.watched)
            over = storage.outcomes(self.study)
            wanted = trials.grid(self.comparison, over)
            storage.add(self.study, self.comparison, wanted)
            if trials.choose(self.comparison, over) is not None and {o.trial for o in over} >= set(wanted):
                return
            if self.study.get_trials(deepcopy=False, states=(states.WAITING,)):
                self._do_one()
            else:
                self.stopped.wait(POLL)

    def _do_one(self) -> None:
        try:
            self.study.optimize(self._objective, n_trials=1, catch=(KilledError,))
        except ValueError as error:
            # The machine slept, another worker took the run over, and Optuna refuses this one's result.
            if not str(error).startswith("Cannot tell a"):
                raise

    def _objective(self, found: Any) -> float:
        """Do the run that the study has handed out."""
        pruned = require("optuna").TrialPruned
        trial = storage.trial_of(found.params)
        if trial is None:
            raise pruned("another worker took the last one")
        if storage.live(self.study)[trial].number != found.number:
            raise pruned("another worker had added it, too")
        self._refuse_hopeless(trial)
        found.set_user_attr("worker", f"{platform.node()} {os.getpid()}.{self.number}")
        contestant = next(one for one in self.comparison.contestants if one.key == trial.contestant)
        folder = folder_of_runs(self.output, self.study) / f"{found.number}-{trial.contestant}"
        shutil.rmtree(folder, ignore_errors=True)  # of a worker that was killed
        config = self.comparison.config(contestant, trial.learning_rate, trial.seed, folder)
        try:
            result = train_apart(config, self.number, self.workers)
        except KilledError:
            found.set_user_attr(storage.KILLED, True)
            raise
        except DivergedError as error:
            found.set_user_attr(storage.PROBLEM, first_line(error))
            raise pruned(str(error)) from error
        storage.refuse_changed_data(self.study, self.comparison)
        values = {key: value for key, value in dataclasses.asdict(result).items() if key not in UNINTERESTING}
        score = Outcome(trial, values).score(self.comparison.by_accuracy)
        if score is None or not math.isfinite(score):
            told = f"the score is {score}"
            found.set_user_attr(storage.PROBLEM, told)
            raise pruned(told)
        found.set_user_attr(storage.RESULT, values)
        return score

    def _refuse_hopeless(self, trial: Trial) -> None:
        states = require("optuna").trial.TrialState
        failed = self.study.get_trials(deepcopy=False, states=(states.FAIL,))
        attempts = sum(storage.trial_of(one.params) == trial and storage.KILLED in one.user_attrs for one in failed)
        if attempts >= ATTEMPTS:
            raise AdapterError(f"the run {trial} was killed {attempts} times; is there enough memory for it?")


def run_all(
    comparison: Comparison,
    study: Callable[[], Any],
    output: Path,
    workers: int = 1,
    watch: Watch = lambda over, count, running: None,
) -> list[Outcome]:
    """Do what is missing, together with whoever else works on the study, and wait for them.

    Args:
        comparison: what is compared.
        study: opens the study, for each worker anew.
        output: folder for what is being trained.
        workers: runs at a time.
        watch: called once a second.

    Returns:
        All runs.

    Raises:
        AdapterError: if a run cannot be done.
        KeyboardInterrupt: on Ctrl-C; every run that is over is kept.
    """
    stopped = threading.Event()
    crew = [Worker(comparison, study(), output, number, workers, stopped) for number in range(workers)]
    own = study()
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(worker.work) for worker in crew]
        try:
            waiting: Any = jobs
            while waiting:
                done, waiting = wait(jobs, timeout=POLL, return_when=FIRST_EXCEPTION)
                _watch(comparison, own, watch)
                for job in done:
                    job.result()
        finally:
            stopped.set()
    shutil.rmtree(folder_of_runs(output, own), ignore_errors=True)
    with contextlib.suppress(OSError):  # another study of this output is being done
        (output / RUNS).rmdir()
    return storage.outcomes(own)


def folder_of_runs(output: Path, study: Any) -> Path:
    """Where a study's runs train."""
    return output / RUNS / quote(study.study_name, safe="")


def _watch(comparison: Comparison, study: Any, watch: Watch) -> None:
    states = require("optuna").trial.TrialState
    over = storage.outcomes(study)
    running = study.get_trials(deepcopy=False, states=(states.RUNNING,))
    swept = trials.choose(comparison, over) is not None
    count = len(trials.grid(comparison, over)) if swept else trials.size(comparison)
    watch(over, count, len(running))
