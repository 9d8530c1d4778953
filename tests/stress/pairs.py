"""Starts, or resumes, two runs on one folder at the same moment: one runs, the other is refused.

Two forked processes, which need no seconds to import torch: they start within a millisecond.
"""

from __future__ import annotations

import multiprocessing
import random
import shutil
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch
from rich.console import Console
from tiny_runs import SETTINGS, difference, main, results

from fastnas.runs.search import run_search
from fastnas.search.config import SearchConfig, make_config
from fastnas.search.run_folder import RunFolderError
from fastnas.search.searcher import Searcher

RAN, REFUSED, FAILED = 0, 2, 1
SHORT = {**SETTINGS, "epochs": 2, "train_epochs": 1, "tensorboard": False}
FORK = multiprocessing.get_context("fork")


def run(out: Path, resume: bool, together: Barrier, wait: float) -> None:
    """One of the two; its exit code says what became of it."""
    torch.set_num_threads(1)
    config = make_config(SearchConfig, {**SHORT, "out": str(out)})
    together.wait()
    time.sleep(wait)
    try:
        run_search(config, resume=resume, console=Console(quiet=True))
    except RunFolderError:
        raise SystemExit(REFUSED) from None
    raise SystemExit(RAN)


def pair(out: Path, resume: bool, wait: float) -> list[int | None]:
    """The exit codes of two runs, the second of which begins so much later."""
    together = FORK.Barrier(2)
    both = [FORK.Process(target=run, args=(out, resume, together, w)) for w in (0.0, wait)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        process.kill()
    return sorted(process.exitcode for process in both if process.exitcode is not None)


def half_done(out: Path) -> None:
    """A folder whose run was killed after its first epoch."""
    config = make_config(SearchConfig, {**SHORT, "out": str(out)})
    run_search(config, console=Console(quiet=True))
    for path in out.iterdir():
        if path.name != "config.json":
            path.unlink()
    searcher = Searcher(config)
    searcher.start_epoch()
    searcher.make_step()
    searcher.save(out / "search.pt")


def check(count: int, seed: int) -> list[str]:
    """The faults of so many pairs of starts and as many of resumes."""
    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    draw, faults = random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "template"
        half_done(template)
        expected = None
        for i in range(2 * count):
            out, resume = Path(folder) / f"run{i}", i % 2 == 1
            if resume:
                shutil.copytree(template, out)
            codes = pair(out, resume, draw.choice([0.0, 0.0, draw.uniform(0, 0.02)]))
            wrong = None if codes == [RAN, REFUSED] else f"exit codes {codes}"
            if wrong is None:
                found = results(out)
                expected = expected or found
                where = difference(found, expected)
                wrong = where and f"differs at {where}"
            if wrong:
                faults.append(f"{'resumes' if resume else 'starts'} {i}: {wrong}")
            shutil.rmtree(out)
    return faults


if __name__ == "__main__":
    main(__doc__, 100, check)
