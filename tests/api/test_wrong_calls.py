"""Wrong calls of the public API get one clear error; a fixed part of what wrong_calls.py draws."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import time
from collections.abc import Callable
from typing import Any

import pytest
import wrong_calls
from calls_tables import TABLES
from wrong_values import Call, integer

import fastnas
from fastnas.checks import check_int

NUMBERS = range(600)
TESTED = ("nn", "ops", "reference", "report", "search", "spaces", "strategies")


@pytest.mark.parametrize("table", sorted(TABLES))
def test_the_valid_calls_are_accepted(table: str, tmp_path, monkeypatch) -> None:
    """Else the generator would find errors that are those of the calls."""
    monkeypatch.chdir(tmp_path)
    for call in TABLES[table]:
        call.function(**{name: argument.valid() for name, argument in call.arguments.items()})


def test_wrong_calls_are_refused_by_name() -> None:
    assert_clean(NUMBERS, wrong_calls.Cases(only=TESTED))


def test_single_wrong_values_are_refused_by_name() -> None:
    """One in seven of them, so that it is quick; which are drawn above is up to chance."""
    cases = wrong_calls.Cases(singles=True)
    assert_clean(range(0, len(wrong_calls.singles(cases.calls())), 7), cases)


def assert_clean(numbers: range, cases: wrong_calls.Cases) -> None:
    found = list(wrong_calls.verdicts(numbers, cases))
    assert len(found) == len(numbers)
    faults = [str(verdict) for verdict in found if not verdict.is_clean]
    assert not faults, "\n".join(faults)


def work_for_ever(size: int) -> None:
    while True:
        pass


VERDICTS: dict[str, Callable[[Any], Any]] = {
    "accepted": lambda size: None,
    "AttributeError": lambda size: size.nothing,
    "TypeError without a name": lambda size: int(None),
    "clean": lambda size: check_int("size", size, 1),
    "signal 6": lambda size: os.abort(),
    "hang: more than 0.5 s of the processor": work_for_ever,
}


def test_every_verdict_can_be_given(monkeypatch) -> None:
    """Of a table with these calls, which a child makes, and the next one after it has died."""
    monkeypatch.setattr(wrong_calls, "HANG", 0.5)
    found = list(wrong_calls.verdicts(range(7), wrong_calls.Cases(tables=own_table(VERDICTS))))
    assert [verdict.case for verdict in found] == list(range(7))
    assert {verdict.call for verdict in found} == set(VERDICTS)
    for verdict in found:
        assert verdict.kind == verdict.call, verdict


def test_what_only_waits_is_given_up(monkeypatch) -> None:
    """A second on the clock: that other processes keep the processor busy changes no verdict."""
    monkeypatch.setattr(wrong_calls, "PATIENCE", 1.0)
    table = own_table({"sleeps": lambda size: time.sleep(60)})
    [verdict] = wrong_calls.verdicts(range(1), wrong_calls.Cases(tables=table))
    assert verdict.kind == "hang: it waits for 1 s"


def own_table(calls: dict[str, Callable[[Any], Any]]) -> dict[str, list[Call]]:
    return {"own": [Call(kind, call, {"size": integer(3, 1, 5)}) for kind, call in calls.items()]}


UNCHECKED = {
    "AnyGenotype": "what Genotype and NB201Genotype have in common",
    "Layout": "what the layouts have in common",
    "Dag": "what Cell and NB201Cell have in common",
    "FolderConfig": "what configs have in common, as RunConfig",
    "RunConfig": "as FolderConfig",
    "Evaluator": "a protocol",
    "Edge": "checked by EdgeTable, which takes it, as EdgeTerm",
    "EdgeTerm": "as Edge",
    "HardWeights": "checked by the networks that take it",
    "Evaluation": "a result, as PathSample and Report",
    "PathSample": "as Evaluation",
    "Report": "as Evaluation",
    "Profile": "as Evaluation",
    "Row": "as Evaluation",
    "weighted_sum": "the baseline of the benchmarks: what is timed is the public code",
    "keep_freed_memory": "takes nothing, as check_environment",
    "check_environment": "as keep_freed_memory",
    "SavedTensors": "what backends get from the ops, which check it, as OpInfo and Request",
    "OpInfo": "as SavedTensors",
    "Request": "as SavedTensors",
    "accumulation_dtype": "as SavedTensors",
    "choose": "as SavedTensors",
}
"""Public names without a wrong call, and why."""


def test_every_public_name_has_wrong_calls() -> None:
    covered = {call.covers for table in TABLES.values() for call in table}
    public: set[str] = set()
    for module in pkgutil.walk_packages(fastnas.__path__, "fastnas."):
        if module.name.partition(".kernels")[1] or module.name.endswith(("._C", "._cuda")):
            continue
        found = importlib.import_module(module.name)
        for name in getattr(found, "__all__", ()):
            value = getattr(found, name)
            is_error = inspect.isclass(value) and issubclass(value, Exception)
            if (inspect.isclass(value) or inspect.isroutine(value)) and not is_error:
                public.add(name)
    assert public - covered == set(UNCHECKED) & public
    assert set(UNCHECKED) <= public | set(fastnas.__all__)
