"""Runs black-box searches as Optuna studies: any number of workers, killed and resumed at will.

A trial is one evaluation. What a method proposes depends on the trials so far and on (seed, trial
number) alone, so a resumed study of one worker goes on as if it had not stopped.
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from fastnas import signals
from fastnas.blackbox.claims import Claims
from fastnas.blackbox.domains import Domain, Point, unseen_cell
from fastnas.blackbox.methods.base import BlackBox, Observation
from fastnas.evaluators import Evaluation, Evaluator
from fastnas.search.config import ConfigError
from fastnas.spaces import AnyGenotype, layout_of, parse
from fastnas.text_file import file_path

NAME = "fastnas"
GRACE_SECONDS = 30
"""Without a sign of life after which an evaluation is given to another worker."""
POLL_SECONDS = 0.2
ATTEMPTS = 4
"""To open a study."""
SETTINGS = "settings"
LIVE = (TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING)
"""States of the trials that count: they have an evaluation, or may have one yet."""
SQLITE = "sqlite:///"
LOCK_SECONDS = 100


class StudyError(ConfigError):
    """Tells that a study cannot be used; one line says why."""


@dataclass(frozen=True)
class Result:
    """Holds what a study has found.

    Attributes:
        cells: evaluated, in the order in which they were proposed, with their evaluations.
        best: index of the most accurate; of equal ones the first.
    """

    cells: Sequence[tuple[str, Evaluation]]
    points: Sequence[Point]
    best: int

    def incumbents(self) -> list[int]:
        """Returns, after each evaluation, the index of the best so far."""
        found: list[int] = []
        for i, (_, evaluation) in enumerate(self.cells):
            better = not found or evaluation.accuracy > self.cells[found[-1]][1].accuracy
            found.append(i if better else found[-1])
        return found


class Study:
    """Gives one worker its view of a study.

    Args:
        database: the path of an SQLite file, or the URL of a database as SQLAlchemy writes it,
            such as sqlite:///study.db.
        method: proposes.
        evaluator: evaluates the cells of its layout.
        seed: of proposals and of the cells that are drawn.
        settings: what all workers must agree on; kept with the study.
        grace_seconds: as `GRACE_SECONDS`.

    Raises:
        StudyError: no database there, or a study with other settings.
    """

    def __init__(
        self,
        database: str | Path,
        method: BlackBox,
        evaluator: Evaluator,
        seed: int,
        settings: Mapping[str, Any],
        grace_seconds: int = GRACE_SECONDS,
    ) -> None:
        layout = evaluator.layout
        self.domain, self.evaluator, self.seed = method.domain(layout), evaluator, seed
        self.grace = timedelta(seconds=grace_seconds)
        self._sampler = _Proposals(method, self.domain, seed)
        with _quiet():
            # The study is opened before it is agreed on: another worker may have made it first, and
            # then its settings are those that count.
            self._study, self._claims = _opened(database, self._sampler, grace_seconds)
        self._agree({**settings, "operations": list(layout.ops), "length": layout.length})

    def run(self, budget: int, told: Callable[[int, float], object] | None = None) -> None:
        """Evaluates until the study, with all its workers, has `budget` evaluations.

        Args:
            told: hears how many are new, and the best accuracy so far.

        Raises:
            EvaluationError: as the evaluator; what was evaluated before stays.
            Stopped: a signal has asked for it, where signals are handled; after the evaluation
                under way, but for a training, which ends after its step and is done again.
        """
        self._budget, heard = budget, 0
        with signals.deferred() as stop:
            while True:
                values = [t.values[0] for t in self._trials(TrialState.COMPLETE)]
                if told is not None and len(values) > heard:
                    told(len(values) - heard, max(values))
                    heard = len(values)
                if len(values) >= budget:
                    return
                # A signal is looked at between evaluations. Optuna has stored what was evaluated,
                # so nothing else is saved here.
                stop.check(f"the study, after {len(values)} evaluations,")
                with _quiet(), _refusals():
                    # Evaluations of dead workers are given back first, or a study could wait for
                    # them for good.
                    self._fail_stale()
                    # Running trials count, or their evaluations would exceed the budget when they
                    # arrive.
                    if len(self._live()) < budget or self._trials(TrialState.WAITING):
                        self._study.optimize(self._evaluate, n_trials=1)
                    else:  # the others may die yet
                        time.sleep(POLL_SECONDS)

    def result(self) -> Result:
        """Returns what was found; StudyError where nothing was evaluated."""
        trials = self._trials(TrialState.COMPLETE)
        if not trials:
            raise StudyError("the study has no evaluation")
        cells = [
            (
                t.user_attrs["cell"],
                Evaluation(t.values[0], t.user_attrs["seconds"], t.user_attrs["epochs"]),
            )
            for t in trials
        ]
        # `max` keeps the first of equal ones, so every worker reports the same cell.
        best = max(range(len(cells)), key=lambda i: cells[i][1].accuracy)
        return Result(cells, [self._sampler.point(t.params) for t in trials], best)

    def _evaluate(self, trial: Any) -> float:
        point = tuple(trial.suggest_int(name, 0, n - 1) for name, n in self.domain.sizes.items())
        # Two workers may have seen one evaluation missing at the same time. The trials with the
        # lowest numbers count, which both read from the database alike.
        if trial.number not in {t.number for t in self._live()[: self._budget]}:
            raise optuna.TrialPruned  # another worker took the last one at the same moment
        origin = self._sampler.origins.pop(trial.number, None)
        if origin is not None:
            trial.set_user_attr("origin", origin)
        cell = self._claimed(point, trial.number)
        # The cell is stored before it is evaluated: other workers must see that it is taken.
        trial.set_user_attr("cell", text_of(cell))
        (evaluation,) = self.evaluator.evaluate([cell], [self._evaluation_seed(trial.number)])
        trial.set_user_attr("seconds", evaluation.seconds)
        trial.set_user_attr("epochs", evaluation.epochs)
        return evaluation.accuracy

    def _claimed(self, point: Point, number: int) -> AnyGenotype:
        """Returns the cell that this trial evaluates, and no other at the same time.

        Where all that the point stands for is being evaluated, the trial is pruned, and the method
        proposes another, which sees those.
        """
        lost: set[AnyGenotype] = set()
        while True:
            texts = [t.user_attrs.get("cell") for t in self._live() if t.number != number]
            seen = {parse(text) for text in texts if text is not None} | lost
            # The last number keeps the streams of a trial apart: none proposes, 1 draws the cell, 2
            # seeds the evaluation.
            rng = np.random.default_rng([self.seed, number, 1])
            cell = unseen_cell(self.domain, point, rng, seen)
            is_again = cell in seen
            if self._claims.take(text_of(cell), number, partial(self._is_free, is_again)):
                return cell
            if is_again or not self.domain.is_noisy:
                time.sleep(POLL_SECONDS)
                raise optuna.TrialPruned
            lost.add(cell)

    def _is_free(self, is_again: bool, holder: int) -> bool:
        """Tells whether a cell can be taken from the trial that holds it.

        It can where that trial is dead, or has evaluated the cell and the method, which knew,
        proposed it again.
        """
        states = {t.number: t.state for t in self._live()}
        # A trial that is not live has died, and its claim with it.
        return holder not in states or (is_again and states[holder] == TrialState.COMPLETE)

    def _evaluation_seed(self, number: int) -> int:
        """Returns a seed below 2^32, of the study's seed and the trial's number."""
        return int(np.random.SeedSequence([self.seed, number, 2]).generate_state(1)[0])

    def _live(self) -> list[FrozenTrial]:
        return self._trials(*LIVE)

    def _trials(self, *states: Any) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states)

    def _fail_stale(self) -> None:
        """Gives back the trials of dead workers.

        Those with a heartbeat wait to be run again; those that died while they were proposed have
        none, and no point either.
        """
        optuna.storages.fail_stale_trials(self._study)
        for trial in self._trials(TrialState.RUNNING):
            # Optuna's times are local and without a zone, so they are compared with such a time.
            since = datetime.now() - (trial.datetime_start or datetime.now())
            if not trial.params and since > self.grace:
                self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _agree(self, settings: Mapping[str, Any]) -> None:
        if SETTINGS not in self._study.user_attrs:
            self._study.set_user_attr(SETTINGS, json.dumps(dict(settings)))
        # It is read back from the database: where two workers set it at once, both compare with the
        # one that stayed.
        found = json.loads(self._study.user_attrs[SETTINGS])  # another may have been first
        # The way through JSON makes tuples lists here as well, as they are in what was stored.
        given = json.loads(json.dumps(dict(settings)))
        differing = [
            f"{name} {found.get(name)!r}, not {given.get(name)!r}"
            for name in dict.fromkeys([*found, *given])
            if found.get(name) != given.get(name)
        ]
        if differing:
            raise StudyError(f"the study is one of other settings: {'; '.join(differing)}")


class _Proposals(BaseSampler):
    """Offers a method as an Optuna sampler."""

    def __init__(self, method: BlackBox, domain: Domain, seed: int) -> None:
        self.method, self.domain, self.seed = method, domain, seed
        self.origins: dict[int, Point] = {}

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, Any]:
        return {
            name: optuna.distributions.IntDistribution(0, size - 1)
            for name, size in self.domain.sizes.items()
        }

    def sample_relative(
        self, study: Any, trial: FrozenTrial, search_space: dict[str, Any]
    ) -> dict[str, Any]:
        past = [
            self._observation(other)
            for other in study.get_trials(deepcopy=False, states=LIVE)
            # Only trials that have a point are seen, and of those only earlier ones: this one is
            # running too.
            if other.number < trial.number and len(other.params) == len(self.domain.sizes)
        ]
        rng = np.random.default_rng([self.seed, trial.number])
        (proposed,) = self.method.propose(self.domain, past, rng)
        if proposed.origin is not None:
            self.origins[trial.number] = proposed.origin
        return dict(zip(self.domain.sizes, proposed.point))

    def sample_independent(self, *_: Any) -> Any:
        raise AssertionError("all parameters are relative")

    def point(self, params: Mapping[str, int]) -> Point:
        return tuple(params[name] for name in self.domain.sizes)

    def _observation(self, trial: FrozenTrial) -> Observation:
        origin = trial.user_attrs.get("origin")
        value = trial.values[0] if trial.state == TrialState.COMPLETE else None
        return Observation(
            self.point(trial.params), value, None if origin is None else tuple(origin)
        )


def _opened(database: str | Path, sampler: Any, grace_seconds: int) -> tuple[Any, Claims]:
    """Opens the study and its claims, which it makes if need be.

    It tries again where that fails, as another worker may be making them just now.
    """
    url, engine = _engine(database)
    for attempt in range(ATTEMPTS):
        try:
            storage = optuna.storages.RDBStorage(
                url,
                engine_kwargs=engine,
                # Four signs of life fit into the grace period, so one that comes late kills no
                # evaluation.
                heartbeat_interval=max(1, grace_seconds // 4),
                grace_period=grace_seconds,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
            )
            study = optuna.create_study(
                study_name=NAME,
                storage=storage,
                sampler=sampler,
                direction="maximize",
                load_if_exists=True,
            )
            return study, Claims(storage.engine)
        except Exception as error:  # SQLAlchemy's and those of its drivers
            if attempt == ATTEMPTS - 1:
                # A password in the URL must not stand in an error message, or in a log of it.
                shown = re.sub(r"//([^:/@]+):[^@]*@", r"//\1:***@", str(database))
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise StudyError(f"study {shown}: {reason}") from error
            time.sleep(POLL_SECONDS)
    raise AssertionError("the last attempt returns or raises")


def _engine(database: str | Path) -> tuple[str, dict[str, Any]]:
    """Returns the URL that Optuna opens, and arguments of SQLAlchemy's engine.

    The name of a file is handed to the driver as it is: in a URL `?`, `#`, `%` and `{` would be
    read. Optuna fills in templates, so braces of a given URL are doubled.
    """
    if isinstance(database, Path):
        # `check_same_thread` is off because Optuna's heartbeat writes from a thread of its own.
        connect = partial(sqlite3.connect, database, timeout=LOCK_SECONDS, check_same_thread=False)
        return SQLITE + "study.db", {"creator": connect}
    if database.rstrip("/") in ("sqlite:", "sqlite:///:memory:"):
        raise StudyError(f"study {database} is in memory, where nothing stays; a file is needed")
    if database.startswith(SQLITE + "~"):
        database = SQLITE + str(file_path(database.removeprefix(SQLITE)))
    url = database.replace("{", "{{").replace("}", "}}")
    is_sqlite = database.startswith("sqlite")
    return url, {"connect_args": {"timeout": LOCK_SECONDS}} if is_sqlite else {}


def text_of(cell: AnyGenotype) -> str:
    """Writes a cell as one line that `fastnas.spaces.parse` reads."""
    return layout_of(cell).line(cell)


@contextmanager
def _refusals() -> Any:
    """Turns what a database refuses, as on a full disk, into one line."""
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise StudyError(f"the study's database refuses: {reason}") from error


@contextmanager
def _quiet() -> Any:
    """Silences Optuna's line a trial, and its warnings that heartbeats are experimental."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
