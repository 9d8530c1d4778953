"""Seeded wrong calls of the public Python API, each in a process that may die of it.

    python tests/api/wrong_calls.py [--count 1000] [--seed 0] [--only MODULE] [--case N]

A case takes a valid call and replaces one or two arguments by values that the docstring forbids.
Right is a ValueError, a TypeError or an error class of fastnas whose message names an argument
that is wrong. Everything else is a fault: another error, one that does not say which argument, a
call that is accepted, a signal, and more than five seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import os
import queue
import random
import re
import subprocess
import sys
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from json import dumps, loads
from pathlib import Path
from typing import Any

from wrong_values import Argument, Call

HANG = 5.0
"""Seconds."""
START = 120.0


@dataclass(frozen=True)
class Verdict:
    """What came of a case; `kind` is "clean" or a fault."""

    case: int
    call: str
    wrong: dict[str, str]
    kind: str
    message: str = ""

    @property
    def is_clean(self) -> bool:
        return self.kind == "clean"

    def __str__(self) -> str:
        given = ", ".join(f"{name}={label}" for name, label in self.wrong.items())
        return f"case {self.case}: {self.call}({given}): {self.kind} {self.message}"


def calls(only: str | None = None) -> list[Call]:
    """The calls of all tables, or of one."""
    from calls_tables import TABLES

    return [call for name, table in TABLES.items() if only in (None, name) for call in table]


def draw(case: int, seed: int, table: list[Call]) -> tuple[Call, dict[str, tuple[str, Any]]]:
    """The call of a case and its wrong arguments, each a label and a maker; functions of the seed.

    The calls take turns, so that all are called before one is called again.
    """
    rng = random.Random(f"{seed} {case}")
    order = list(table)
    random.Random(seed).shuffle(order)
    call = order[case % len(order)]
    names = [name for name, argument in call.arguments.items() if argument.wrong]
    chosen = rng.sample(names, min(len(names), rng.choice((1, 1, 1, 2))))
    return call, {name: rng.choice(call.arguments[name].wrong) for name in chosen}


def judge(case: int, call: Call, wrong: dict[str, tuple[str, Any]]) -> Verdict:
    """Makes the call and says what came of it."""
    import torch

    torch.manual_seed(0)
    values = {
        name: wrong[name][1]() if name in wrong else argument.valid()
        for name, argument in call.arguments.items()
    }
    label = call.label or f"{call.function.__module__}.{call.function.__qualname__}"
    labels = {name: text for name, (text, _) in wrong.items()}

    def verdict(kind: str, error: BaseException | str = "") -> Verdict:
        return Verdict(case, label, labels, kind, " ".join(str(error).split())[:200])

    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            result = call.function(**values)
    except Exception as error:
        ours = isinstance(error, ValueError | TypeError) or type(error).__module__.startswith(
            "fastnas."
        )
        if not ours:
            return verdict(type(error).__name__, error)
        named = any(_names(str(error), name, call.arguments[name]) for name in wrong)
        return verdict("clean" if named else f"{type(error).__name__} without a name", error)
    return verdict("accepted", f"-> {type(result).__name__}")


def _names(message: str, name: str, argument: Argument) -> bool:
    return any(
        re.search(rf"(?<![A-Za-z0-9_]){re.escape(word)}(?![A-Za-z0-9_])", message)
        for word in (name, *argument.says)
    )


def serve(cases: list[int], seed: int, only: str | None) -> None:
    """The child: a line of JSON before a case and one with its verdict after it."""
    faulthandler.enable()
    table = calls(only)
    out = sys.stdout
    print(dumps({"ready": True}), file=out, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for case in cases:
            call, wrong = draw(case, seed, table)
            print(dumps({"begins": case}), file=out, flush=True)
            print(dumps(asdict(judge(case, call, wrong))), file=out, flush=True)


def verdicts(cases: range, seed: int = 0, only: str | None = None) -> Iterator[Verdict]:
    """Of all cases; a child that dies or hangs is followed by another for the cases after it."""
    left = list(cases)
    while left:
        left = yield from _one_child(left, seed, only)


def _one_child(
    cases: list[int], seed: int, only: str | None
) -> Iterator[Verdict]:  # returns the cases that are left
    command = [sys.executable, __file__, "--serve", dumps(cases), "--seed", str(seed)]
    command += ["--only", only] if only else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    lines: queue.Queue[str | None] = queue.Queue()
    assert child.stdout is not None and child.stderr is not None
    errors: list[str] = []
    readers = [
        threading.Thread(target=lambda: ([*map(lines.put, child.stdout)], lines.put(None))),
        threading.Thread(target=lambda: errors.extend(child.stderr)),
    ]
    for reader in readers:
        reader.start()
    left, patience, what = list(cases), START, ""
    while left and not what:
        try:
            line = lines.get(timeout=patience)
        except queue.Empty:
            what = f"hang of more than {patience:.0f} s"
            break
        if line is None:
            what = f"signal {-child.wait()}" if child.wait() < 0 else f"exit {child.wait()}"
            break
        said = loads(line)
        patience = HANG
        if "kind" in said:
            yield Verdict(**said)
            left.pop(0)
    child.kill()
    for reader in readers:
        reader.join()
    if what:
        call, wrong = draw(left[0], seed, calls(only))
        labels = {name: label for name, (label, _) in wrong.items()}
        yield Verdict(left.pop(0), call.covers, labels, what, " ".join(errors)[-600:])
    return left


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one table of calls")
    parser.add_argument("--case", type=int, help="one case, in this process, with its traceback")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(loads(given.serve), given.seed, given.only)
        return
    if given.case is not None:
        call, wrong = draw(given.case, given.seed, calls(given.only))
        values = {name: a.valid() for name, a in call.arguments.items()}
        values |= {name: make() for name, (_, make) in wrong.items()}
        print(call.covers, {name: label for name, (label, _) in wrong.items()})
        print(call.function(**values))
        return
    found: Counter[str] = Counter()
    for verdict in verdicts(range(given.count), given.seed, given.only):
        found[verdict.kind] += 1
        if not verdict.is_clean:
            print(verdict, flush=True)
    print(", ".join(f"{kind} {count}" for kind, count in found.most_common()))
    sys.exit(found["clean"] != given.count)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
