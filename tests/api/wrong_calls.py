"""Seeded wrong calls of the public Python API, each in a process that may die of it.

    python tests/api/wrong_calls.py [--count 1000] [--seed 0] [--only MODULE] [--case N]
    python tests/api/wrong_calls.py --singles

A case takes a valid call and replaces one or two arguments by values that the docstring forbids.
Right is a ValueError, a TypeError or an error class of fastnas whose message names an argument
that is wrong. Everything else is a fault: another error, one that does not say which argument, a
call that is accepted, a signal, and more than five seconds. `--singles` draws nothing: it makes one
call for each wrong value of each argument, 5,500 in half a minute.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from json import dumps, loads
from pathlib import Path
from typing import IO

from wrong_values import Argument, Call, Wrong

sys.path.append(str(Path(__file__).parents[1]))  # where nb201_tables is

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


@dataclass(frozen=True)
class Cases:
    """Which cases are drawn.

    Attributes:
        seed: chooses calls and values.
        only: names of tables; none: all.
        tables: the module that has them.
        singles: no draw: each wrong value of each argument once, alone.
    """

    seed: int = 0
    only: Sequence[str] = ()
    tables: str = "calls_tables"
    singles: bool = False

    def calls(self) -> list[Call]:
        tables = import_module(self.tables).TABLES
        return [
            call
            for name, table in tables.items()
            if not self.only or name in self.only
            for call in table
        ]

    def drawn(self) -> Callable[[int], tuple[Call, dict[str, Wrong]]]:
        """What gives the call of a case and its wrong arguments."""
        table = self.calls()
        if not self.singles:
            return lambda case: draw(case, self.seed, table)
        every = singles(table)
        return lambda case: every[case]


def singles(table: list[Call]) -> list[tuple[Call, dict[str, Wrong]]]:
    return [
        (call, {name: wrong})
        for call in table
        for name, argument in call.arguments.items()
        for wrong in argument.wrong
    ]


def draw(case: int, seed: int, table: list[Call]) -> tuple[Call, dict[str, Wrong]]:
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


def labels(wrong: dict[str, Wrong]) -> dict[str, str]:
    return {name: label for name, (label, _) in wrong.items()}


def judge(case: int, call: Call, wrong: dict[str, Wrong]) -> Verdict:
    """Makes the call and says what came of it."""
    import torch

    torch.manual_seed(0)
    values = {
        name: wrong[name][1]() if name in wrong else argument.valid()
        for name, argument in call.arguments.items()
    }

    def verdict(kind: str, error: BaseException | str = "") -> Verdict:
        text = " ".join(str(error).split())[:200]
        return Verdict(case, call.name, labels(wrong), kind, text)

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


def serve(numbers: list[int], cases: Cases) -> None:
    """The child: a line of JSON before a case and one with its verdict after it."""
    faulthandler.enable()
    drawn, out = cases.drawn(), sys.stdout
    print("{}", file=out, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for number in numbers:
            call, wrong = drawn(number)
            begun = Verdict(number, call.name, labels(wrong), "")
            print(dumps(asdict(begun)), file=out, flush=True)
            print(dumps(asdict(judge(number, call, wrong))), file=out, flush=True)


def verdicts(numbers: range, cases: Cases) -> Iterator[Verdict]:
    """Of all cases; a child that dies or hangs is followed by another for the cases after it."""
    left = list(numbers)
    while left:
        for verdict in _of_one_child(list(left), cases):
            yield verdict
            left.remove(verdict.case)


def _of_one_child(numbers: list[int], cases: Cases) -> Iterator[Verdict]:
    """Ends with the case that the child died of or hangs in, if any."""
    command = [sys.executable, __file__, "--serve", dumps(numbers), "--cases", dumps(asdict(cases))]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        ) as child,
    ):  # fmt: skip
        assert child.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(child.stdout, lines))
        reader.start()
        begun, patience, what = Verdict(numbers[0], "start", {}, ""), START, ""
        while not what:
            try:
                line = lines.get(timeout=patience)
            except queue.Empty:
                what = f"hang of more than {patience:g} s"
                break
            if line is None:
                code = child.wait()
                what = f"signal {-code}" if code < 0 else f"exit {code}"
                break
            patience, said = HANG, loads(line)
            if said.get("kind"):
                yield Verdict(**said)
                if said["case"] == numbers[-1]:
                    break
            elif said:
                begun = Verdict(**said)
        child.kill()
        reader.join()
        if what:
            errors.seek(0)
            yield replace(begun, kind=what, message=errors.read()[-600:])


def _read(lines: IO[str], into: queue.Queue[str | None]) -> None:
    for line in lines:
        into.put(line)
    into.put(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--singles", action="store_true", help="every wrong value, one a call")
    parser.add_argument("--only", nargs="*", default=(), help="tables of calls")
    parser.add_argument("--case", type=int, help="one case, in this process, with its traceback")
    parser.add_argument("--serve", type=loads, help=argparse.SUPPRESS)
    parser.add_argument("--cases", type=loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve, Cases(**given.cases))
        return
    cases = Cases(given.seed, given.only, singles=given.singles)
    if given.case is not None:
        call, wrong = cases.drawn()(given.case)
        print(call.name, labels(wrong))
        values = {name: argument.valid() for name, argument in call.arguments.items()}
        print(call.function(**values | {name: make() for name, (_, make) in wrong.items()}))
        return
    found: Counter[str] = Counter()
    count = len(singles(cases.calls())) if given.singles else given.count
    for verdict in verdicts(range(count), cases):
        found[verdict.kind] += 1
        if not verdict.is_clean:
            print(verdict, flush=True)
    print(", ".join(f"{kind} {count}" for kind, count in found.most_common()))
    sys.exit(found["clean"] != count)


if __name__ == "__main__":
    main()
