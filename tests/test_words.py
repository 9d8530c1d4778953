"""Holds that the first line of every docstring is a sentence: it has a verb, or is an equation."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = sorted(path for path in (ROOT / "fastnas").iterdir() if (path / "__init__.py").exists())
PLACES = (*ROOMS, ROOT / "fastnas", ROOT / "kernels", ROOT / "benchmarks")

# What a module, a class or a function does, in the third person. Add a verb that is missing.
VERBS = frozenset(
    """
    adds allocates announces answers applies asks augments begins benchmarks bounds brings
    builds calls captures casts changes checks chooses claims climbs compares compiles computes
    continues copies corrects counts crops cuts decides declares defines depends derives
    describes differentiates divides does draws drops ends enters evaluates evolves fills finds
    fits follows gathers gives goes groups guards hands has hashes holds implements imports leaves
    inverts is keeps knows lays leads lets lists loads locks logs looks makes maps marks measures
    merges mixes moves multiplies mutates names needs normalises offers opens optimises orders
    packs passes picks plots pools prints profiles proposes puts raises reads records reduces
    refuses removes repeats replaces replays reports resets returns runs samples saves says
    scales scores searches seeds sees sets shares shifts shortens shows silences sorts specifies
    splits stacks stands starts states steps stops stores streams sums takes tells tests times
    trains transposes turns undoes updates uses verifies views warns watches weighs wraps writes
    yields
    """.split()  # noqa: SIM905
)
EQUATION = re.compile(r" (=|~|->) ")
RELATIVE = {"that", "which", "who", "what", "whose", "where", "whether", "why", "how", "as", "if"}

# The docstrings of commands are the help texts that the command line prints.
COMMANDS = {"start", "info", "sample", "draw", "landscape", "bench"}


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yields each name of a file with the first line of its docstring."""
    tree = ast.parse(path.read_text())
    commands = COMMANDS if path == ROOT / "fastnas" / "cli.py" else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text, name = ast.get_docstring(node), getattr(node, "name", "the module")
            if text and name not in commands:
                yield name, text.splitlines()[0]


def has_verb(line: str) -> bool:
    """Tells whether a line has a verb of its own: none that belongs to a relative clause.

    A plural is no verb: "Counts of slots" has none, "Counts slots" has one.
    """
    words = [word.strip(".:;()\"'`").lower() for word in line.split()]
    for word, after in zip(words, [*words[1:], ""]):
        if word.rstrip(",") in RELATIVE:
            return False
        if word.rstrip(",") in VERBS and (after != "of" or word.endswith(",")):
            return True
    return False


def problems(path: Path) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}: {name} begins its docstring with {line!r}; write what it does,"
        ' a verb first, as in "Returns ..." (or add the verb to VERBS here)'
        for name, line in docstrings(path)
        if not (EQUATION.search(f" {line} ") or has_verb(line))
    ]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.name)
def test_docstrings_begin_with_a_verb(place: Path) -> None:
    paths = sorted(place.glob("*.py") if place == ROOT / "fastnas" else place.rglob("*.py"))
    assert paths
    found = [problem for path in paths for problem in problems(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("line", "right"),
    [
        ("Returns the edges.", True),
        ("Draws, for each data set, its regret.", True),
        ("Backward reads every leaf.", True),
        ("The edges of a cell.", False),
        ("Whether the edge is kept.", False),
        ("The box that holds a label.", False),
        ("Counts of slots.", False),
    ],
)
def test_a_verb_is_told_from_a_noun(line: str, right: bool) -> None:
    assert has_verb(line) == right
