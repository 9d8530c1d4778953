"""Fuzzes the ops on the CPU kernels against the fp64 reference; every call follows from its seed.

    python tests/fuzz/ops.py --seconds 300            all ops, dtypes and instruction sets
    python tests/fuzz/ops.py --calls 1000 --op mixed_edges --isa avx2 --seed 7
    python tests/fuzz/ops.py --replay 12345           one call, with what it is made of

The calls run in another process, so that the seed of one that kills it is known; the next process
goes on behind it. --module names another build of fastnas._C, such as that of `make sanitize`.
Exits with 1 where a call missed the rule, died, hung or ended in an error that is not of ours.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from results import ISAS, OPS, Report, Result, subject_of

WORKER = Path(__file__).with_name("worker.py")


def seeds(options: argparse.Namespace) -> Iterator[int]:
    """Endless; those of the wanted ops and instruction sets."""
    for seed in itertools.count(options.seed):
        op, isa = subject_of(seed)
        if op in options.op and isa in options.isa:
            yield seed


def fuzz(options: argparse.Namespace) -> Report:
    """Runs calls in one process after the other, until there are enough or time is up."""
    report = Report()
    wanted = seeds(options)
    end = time.monotonic() + options.seconds if options.seconds else None
    while len(report.results) < options.calls and (end is None or time.monotonic() < end):
        left = options.calls - len(report.results)
        batch = list(itertools.islice(wanted, min(left, 500)))
        while batch:
            done = run_batch(batch, options, report, end)
            batch = batch[done:]
            if end is not None and time.monotonic() > end:
                break
    return report


def run_batch(
    batch: list[int], options: argparse.Namespace, report: Report, end: float | None
) -> int:
    """Calls in a process of their own, until one kills it; how many of them are over."""
    command = [sys.executable, str(WORKER), "--module", options.module, *map(str, batch)]
    done = 0
    with tempfile.TemporaryFile("w+") as errors:
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert worker.stdout is not None
        for line in worker.stdout:
            report.add(Result(**json.loads(line)))
            done += 1
            if end is not None and time.monotonic() > end:
                worker.kill()
                break
        code = worker.wait()
        if done < len(batch) and (end is None or time.monotonic() < end):
            errors.seek(0)
            said = errors.read()
            print(said[-6000:], file=sys.stderr)
            op, isa = subject_of(batch[done])
            report.add(Result(batch[done], op, isa, "", "died", why_died(code, said)))
            done += 1
    return done


def why_died(code: int, said: str) -> str:
    """The line of the sanitizer, of faulthandler, or of Python that says it best."""
    telling = ("runtime error:", "ERROR: AddressSanitizer", "Timeout (", "Fatal Python error:")
    lines = [line for line in said.splitlines() if any(words in line for words in telling)]
    return f"exit code {code}: {(lines or said.splitlines()[-1:] or [''])[0]}"


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--seconds", type=float, help="stop after so long")
    parser.add_argument("--calls", type=int, default=sys.maxsize, help="stop after so many")
    parser.add_argument("--seed", type=int, default=0, help="of the first call")
    parser.add_argument("--op", action="append", choices=OPS, help="by default all")
    parser.add_argument("--isa", action="append", choices=ISAS, help="by default all")
    parser.add_argument("--module", default="", help="another build of fastnas._C")
    parser.add_argument("--replay", type=int, metavar="SEED", help="run this call and tell all")
    options = parser.parse_args(arguments)
    options.op, options.isa = options.op or OPS, options.isa or ISAS
    if options.seconds is None and options.calls == sys.maxsize:
        options.calls = 1000
    return options


def main(arguments: list[str] | None = None) -> int:
    options = options_of(arguments)
    if options.replay is not None:
        told = [sys.executable, str(WORKER), "--module", options.module, "--tell"]
        return subprocess.run([*told, str(options.replay)]).returncode
    report = fuzz(options)
    print(report.text())
    return int(report.faults > 0)


if __name__ == "__main__":
    sys.exit(main())
