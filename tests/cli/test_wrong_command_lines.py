"""Lines that wrong_command_lines.py draws: all are refused, and leave nothing behind."""

import pytest
from wrong_command_lines import CONTRADICTIONS, Draws, Line, judge, numeric_flags

SEED, COUNT = 0, 60


@pytest.mark.parametrize("number", range(0, COUNT, 10))
def test_drawn_lines_are_refused(number):
    draws = Draws(SEED + number)
    for _ in range(10):
        outcome = judge(draws.line())
        assert not outcome.faults, outcome


@pytest.mark.parametrize("arguments", CONTRADICTIONS)
def test_contradictions_are_refused(arguments):
    outcome = judge(Line(list(arguments), "settings that exclude each other"))
    assert not outcome.faults, outcome


def test_a_process_ends_as_this_one_does():
    outcome = judge(Line(["search", "--lr=inf"], "no number"), process=True)
    assert not outcome.faults, outcome


def test_what_is_not_refused_is_seen():
    accepted = judge(Line(["info"], "nothing"))
    assert "exit code 0" in accepted.faults and "not one line of error" in accepted.faults
    drawn = judge(Line(["draw", "genotype.txt", "new.png"], "nothing"))
    assert any(fault.startswith("files left") for fault in drawn.faults)


def test_every_number_of_the_commands_is_drawn():
    commands = Draws(0).commands
    searches = dict.fromkeys(("study", "mobile"), "search")
    drawn = {(searches.get(command, command), flag) for command, flag, _ in numeric_flags()}
    for name, command in commands.items():
        for parameter in command.params:
            if getattr(parameter, "metavar", None) in ("INTEGER", "NUMBER"):
                assert (name, parameter.opts[0]) in drawn
