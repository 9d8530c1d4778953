"""Seeded wrong calls of the public Python API, each in a fork that may die of it.

    python tests/api/wrong_calls.py [--count 1000] [--seed 0] [--only MODULE] [--case N]
    python tests/api/wrong_calls.py --singles

A case takes a valid call and replaces one or two arguments by values that the docstring forbids.
Right is a ValueError, a TypeError or an error class of fastnas whose message names an argument
that is wrong. Everything else is a fault: another error, one that does not say which argument, a
call that is accepted, a signal, more than five seconds of the processor, and a minute in which the
call only waits. `--singles` draws nothing: it makes one call for each wrong value of each argument,
5,500 in half a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

import torch
import torch._dynamo  # else the first step of an optimizer spends two seconds on it

sys.path.append(str(Path(__file__).parents[1]))  # where nb201_tables is

from calls_tables import TABLES
from wrong_values import Argument, Call, Wrong

HANG = 5.0
"""Seconds of the processor: other processes may keep it busy."""
PATIENCE = 60.0
"""Seconds until a call that does not even use the processor is given up."""
FORK = multiprocessing.get_context("fork")


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
        singles: no draw: each wrong value of each argument once, alone.
        tables: the calls, by the part of fastnas that they call.
    """

    seed: int = 0
    only: Sequence[str] = ()
    singles: bool = False
    tables: Mapping[str, list[Call]] = field(default_factory=lambda: TABLES)

    def calls(self) -> list[Call]:
        return [
            call
            for name, table in self.tables.items()
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


def serve(numbers: list[int], cases: Cases, into: Connection, errors: IO[str]) -> None:
    """The child: sends each case before it is tried, without a verdict, and after it with one.

    A signal ends it where a case has used the processor for too long, in native code too.
    """
    os.dup2(errors.fileno(), 2)
    faulthandler.enable(errors)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    drawn = cases.drawn()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for number in numbers:
            call, wrong = drawn(number)
            into.send(Verdict(number, call.name, labels(wrong), ""))
            signal.setitimer(signal.ITIMER_PROF, HANG)
            verdict = judge(number, call, wrong)
            signal.setitimer(signal.ITIMER_PROF, 0)
            into.send(verdict)
        os.chdir("/")


def verdicts(numbers: range, cases: Cases) -> Iterator[Verdict]:
    """Of all cases; a child that dies or hangs is followed by another for the cases after it."""
    left = list(numbers)
    while left:
        for verdict in _of_one_child(list(left), cases):
            yield verdict
            left.remove(verdict.case)


def _of_one_child(numbers: list[int], cases: Cases) -> Iterator[Verdict]:
    """Ends with the case that the child died of or hangs in, if any."""
    begun, what = Verdict(numbers[0], "start", {}, ""), ""
    receiver, sender = FORK.Pipe(duplex=False)
    with tempfile.TemporaryFile("w+") as errors:
        child = FORK.Process(target=serve, args=(numbers, cases, sender, errors))
        child.start()
        sender.close()
        try:
            while begun.case != numbers[-1] or not begun.kind:
                if not receiver.poll(PATIENCE):
                    what = f"hang: it waits for {PATIENCE:g} s"
                    break
                begun = receiver.recv()
                if begun.kind:
                    yield begun
        except EOFError:
            child.join()
            what = _end(child.exitcode)
        finally:
            child.kill()
            child.join()
        if what:
            errors.seek(0)
            yield replace(begun, kind=what, message=errors.read()[-600:])


def _end(code: int | None) -> str:
    """What the exit code of a child says of the case that it died of."""
    if code == -signal.SIGPROF:
        return f"hang: more than {HANG:g} s of the processor"
    return f"signal {-code}" if code is not None and code < 0 else f"exit {code}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--singles", action="store_true", help="every wrong value, one a call")
    parser.add_argument("--only", nargs="*", default=(), help="tables of calls")
    parser.add_argument("--case", type=int, help="one case, in this process, with its traceback")
    given = parser.parse_args()
    cases = Cases(given.seed, given.only, given.singles)
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
