"""Wrong calls of the public API get one clear error; a fixed part of what wrong_calls.py draws."""

from __future__ import annotations

import pytest
import wrong_calls
from calls_tables import TABLES

NUMBERS = range(600)
TESTED = ("nn", "ops", "reference", "report", "search", "spaces", "strategies")


@pytest.mark.parametrize("table", sorted(TABLES))
def test_the_valid_calls_are_accepted(table: str, tmp_path, monkeypatch) -> None:
    """Else the generator would find errors that are those of the calls."""
    monkeypatch.chdir(tmp_path)
    for call in TABLES[table]:
        call.function(**{name: argument.valid() for name, argument in call.arguments.items()})


def test_wrong_calls_are_refused_by_name() -> None:
    faults = [
        str(verdict)
        for verdict in wrong_calls.verdicts(NUMBERS, wrong_calls.Cases(only=TESTED))
        if not verdict.is_clean
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        ("lambda size: None", "accepted"),
        ("lambda size: size.nothing", "AttributeError"),
        ("lambda size: int(None)", "TypeError without a name"),
        ("lambda size: check_int('size', size, 1)", "clean"),
        ("lambda size: os.abort()", "signal 6"),
        ("lambda size: time.sleep(60)", "hang"),
    ],
)
def test_every_verdict_can_be_given(function: str, kind: str, monkeypatch, tmp_path) -> None:
    """A table with one call, which a child makes."""
    (tmp_path / "own_tables.py").write_text(
        "import os, time\n"
        "from fastnas.checks import check_int\n"
        "from wrong_values import Call, integer\n"
        f"TABLES = {{'own': [Call('f', {function}, {{'size': integer(3, 1, 5)}}, 'f')]}}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(wrong_calls, "HANG", 1.0)
    found = list(wrong_calls.verdicts(range(2), wrong_calls.Cases(tables="own_tables")))
    assert [verdict.kind.startswith(kind) for verdict in found] == [True, True], found
