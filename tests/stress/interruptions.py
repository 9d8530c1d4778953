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

from tiny_runs import answer_signals, command, difference, finish, left_behind, main, results

STARTED = 0.3
CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
METHODS = ((), ("--method=rome", "--samples=2"))


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
        expected, seconds = {}, {}
        for flags in METHODS[: max(1, count // 2)]:
            started = time.perf_counter()
            whole = finish(command(Path(folder) / "whole", *flags))
            seconds[flags] = time.perf_counter() - started
            assert whole.returncode == 0, whole.stderr
            expected[flags] = results(Path(folder) / "whole")
            (Path(folder) / "whole").rename(Path(folder) / f"whole{len(expected)}")
        for i in range(count):
            flags, out = draw.choice(list(expected)), Path(folder) / f"run{i}"
            by, after = list(CODES)[i % 3], draw.uniform(STARTED, seconds[flags])
            label = f"{by.name} after {after:.2f} s {' '.join(flags)}"
            wrong = interrupted(command(out, "--resume", *flags), after, by)
            again = finish(command(out, "--resume", *flags))
            if again.returncode != 0:
                wrong = wrong or f"not resumed: {again.stderr}"
            else:
                where = difference(results(out), expected[flags])
                wrong = wrong or (where and f"differs at {where}") or left_behind(out)
            if wrong:
                faults.append(f"{label}: {wrong}")
    return faults


if __name__ == "__main__":
    main(__doc__, 40, check)
