"""Fills the disk under a search: one clear line, no stray file; with room again it goes on.

The disk is a tmpfs in a mount namespace of this script's own, which Linux gives to any user, and a
file that fills it but for a random rest.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tiny_runs import command, difference, finish, left_behind, main, one_line, results, resume_here

NAMESPACE = "FASTNAS_STRESS_DISK"
SIZE = 16 << 20


def is_possible() -> bool:
    """Whether this user may mount a disk of its own."""
    line = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", tempfile.gettempdir()]
    return (
        shutil.which("unshare") is not None
        and not subprocess.run(line, check=False, capture_output=True).returncode
    )


def check(count: int, seed: int) -> list[str]:
    """The faults of a disk that is full at so many places."""
    draw, faults = random.Random(seed), []
    disk = Path(os.environ[NAMESPACE])
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", disk], check=True)
    assert resume_here(disk / "whole") is None
    expected = results(disk / "whole")
    needed = sum(path.stat().st_size for path in (disk / "whole").rglob("*"))
    shutil.rmtree(disk / "whole")
    for i in range(count):
        # Spread over what a run writes, so that each of its files is the first too large for once.
        free = int(needed * (i + draw.random()) / count)
        filler, out = disk / "filler", disk / "run"
        filler.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - free)))
        full = finish(command(out))
        wrong = None
        if full.returncode != 1:
            wrong = f"exit code {full.returncode}: {full.stderr}"
        elif "No space left" not in full.stderr:
            wrong = f"it does not say why: {full.stderr}"
        wrong = wrong or one_line(full.stderr) or left_behind(out)
        filler.unlink()
        again = resume_here(out)
        if again is None:
            where = difference(results(out), expected)
            again = where and f"differs at {where}"
        wrong = wrong or again
        if wrong:
            faults.append(f"{free} of {needed} bytes free: {wrong}")
        shutil.rmtree(out)
    return faults


def inside(arguments: list[str]) -> int:
    """This script once more, where it may mount; returns its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        line = ["unshare", "-rm", sys.executable, __file__, *arguments]
        return subprocess.run(line, check=False, env={**os.environ, NAMESPACE: folder}).returncode


if __name__ == "__main__":
    if NAMESPACE not in os.environ:
        if not is_possible():
            sys.exit("this user cannot mount a disk of its own (unshare -rm)")
        sys.exit(inside(sys.argv[1:]))
    main(__doc__, 10, check)
