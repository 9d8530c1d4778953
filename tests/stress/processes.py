"""Kills one of several processes at a random moment: resumed, the run has the bits of another.

The others end by themselves, with one line of fastnas; torchrun adds its own report.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from tiny_runs import command, difference, left_behind, main, results

SIZE = 2
STARTED = 0.6
"""Share of the seconds of a run before which its processes are importing torch."""
METHODS: tuple[dict[str, Any], ...] = ({}, {"method": "rome", "samples": 2, "spread": "samples"})


def torchrun(arguments: list[str], size: int = SIZE) -> list[str]:
    """The same run in several processes."""
    python, *rest = arguments
    return [
        python,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={size}",
        "--standalone",
        *rest,
    ]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=quiet
    )


def workers(agent: int) -> list[int]:
    """The processes that torchrun has started."""
    text = Path(f"/proc/{agent}/task/{agent}/children").read_text()
    return [int(pid) for pid in text.split()]


def killed(arguments: list[str], out: Path, after: float, which: int) -> str | None:
    """Starts a run and kills one process; returns what is wrong with how the others ended."""
    agent = start(arguments)
    time.sleep(after)
    pids = workers(agent.pid)
    if len(pids) == SIZE:  # else it is done, or torchrun has not started them
        os.kill(pids[which], signal.SIGKILL)
    try:
        _, error = agent.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        for pid in [*workers(agent.pid), agent.pid]:
            os.kill(pid, signal.SIGKILL)
        agent.communicate()
        return "the others did not end"
    ours = [line for line in error.splitlines() if line.startswith("fastnas:")]
    told = [line for line in ours if "lost another" in line or "stopped" in line]
    # The last checkpoint is that of the training; once it is there, the others may be done.
    is_alone = not ours and (out / "train.pt").exists()
    if len(pids) == SIZE and agent.returncode and not is_alone and (len(ours) != 1 or not told):
        return f"it says {ours}"
    return None


def finish(arguments: list[str]) -> str | None:
    """Runs to the end; returns what went wrong."""
    process = start(arguments)
    _, error = process.communicate()
    return f"exit code {process.returncode}: {error}" if process.returncode else None


def check(count: int, seed: int) -> list[str]:
    """The faults of so many kills."""
    draw, faults = random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder:
        whole = []
        for j, settings in enumerate(METHODS[: max(1, count // 2)]):
            started, out = time.perf_counter(), Path(folder) / f"whole{j}"
            failed = finish(torchrun(command(out, **settings)))
            assert failed is None, failed
            whole.append((settings, time.perf_counter() - started, results(out)))
        for i in range(count):
            (settings, seconds, expected), out = draw.choice(whole), Path(folder) / f"run{i}"
            after, which = draw.uniform(STARTED, 1) * seconds, draw.randrange(SIZE)
            again = [*torchrun(command(out, **settings)), "--resume"]
            wrong = killed(again, out, after, which) or finish(again)
            if wrong is None:
                where = difference(results(out), expected)
                wrong = f"differs at {where}" if where else left_behind(out)
            if wrong:
                faults.append(f"process {which} after {after:.2f} s {settings}: {wrong}")
    return faults


if __name__ == "__main__":
    main(__doc__, 5, check)
