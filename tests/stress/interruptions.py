"""Ends a search by a signal at a random moment: resumed, it has the bits of one that ran through.

From 0.3 s on: before, Python itself is starting, and has no handler of ours.
"""

from __future__ import annotations

import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from tiny_runs import (
    answer_signals,
    command,
    difference,
    finish,
    left_behind,
    main,
    results,
    resume_here,
)

STARTED = 0.3
CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
METHODS: tuple[dict[str, Any], ...] = ({}, {"method": "rome", "samples": 2})


def interrupted(arguments: list[str], after: float, by: signal.Signals) -> str | None:
    """Starts a run and ends it; returns what is wrong with how it ended."""
    process = subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=answer_signals,
    )  # fmt: skip
    time.sleep(after)
    process.send_signal(by)
    try:
        _, error = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "it did not end"
    if process.returncode not in (CODES[by], 0):  # 0: it was done
        return f"exit code {process.returncode}: {error}"
    if "Traceback" in error:
        return error
    if process.returncode in (130, 143) and "fastnas: stopped" not in error:
        return f"it says nothing: {error!r}"
    return None


def check(count: int, seed: int) -> list[str]:
    """The faults of so many interruptions."""
    draw, faults = random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder:
        whole = []
        for j, settings in enumerate(METHODS[: max(1, count // 2)]):
            started, out = time.perf_counter(), Path(folder) / f"whole{j}"
            done = finish(command(out, **settings))
            seconds = time.perf_counter() - started
            assert done.returncode == 0, done.stderr
            whole.append((settings, seconds, results(out)))
        for i in range(count):
            (settings, seconds, expected), out = draw.choice(whole), Path(folder) / f"run{i}"
            by, after = list(CODES)[i % 3], draw.uniform(STARTED, seconds)
            label = f"{by.name} after {after:.2f} s {settings}"
            wrong = interrupted([*command(out, **settings), "--resume"], after, by)
            again = resume_here(out, **settings)
            if again is None:
                where = difference(results(out), expected)
                again = (where and f"differs at {where}") or left_behind(out)
            wrong = wrong or again
            if wrong:
                faults.append(f"{label}: {wrong}")
    return faults


if __name__ == "__main__":
    main(__doc__, 40, check)
