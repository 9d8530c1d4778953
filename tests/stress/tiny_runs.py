"""Runs of seconds as a user starts them, and what is compared of two."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastnas.runs.search import run_search
from fastnas.search.checkpoint import load_checkpoint
from fastnas.search.config import SearchConfig, make_config

SETTINGS: dict[str, Any] = {
    "space": "S2",
    "channels": 2,
    "layers": 1,
    "images": 128,
    "batch_size": 16,
    "epochs": 3,
    "train_epochs": 2,
    "train_channels": 2,
    "train_layers": 1,
    "train_batch_size": 64,
    "checkpoint_every": 2,
    "compare_steps": 0,
    "threads": 1,
}


def command(out: Path, **settings: Any) -> list[str]:
    """A search, the training of what it derives, its report."""
    given = {**SETTINGS, **settings, "out": out}
    text = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    return [sys.executable, "-m", "fastnas", "search", *text]


def finish(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """The run to its end."""
    return subprocess.run(arguments, check=False, capture_output=True, text=True)


def resume_here(out: Path, **settings: Any) -> str | None:
    """Resumes a run in this process, which need not import torch anew; returns what failed."""
    config = make_config(SearchConfig, {**SETTINGS, **settings, "out": str(out)})
    try:
        run_search(config, resume=True, console=Console(quiet=True))
    except Exception as error:  # what the scripts look for
        return f"not resumed: {error!r}"
    return None


def answer_signals() -> None:
    """For a process that is to be started: what runs in the background ignores Ctrl-C."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def results(out: Path) -> dict[str, Any]:
    """All that a run has found, but the clock and the names of folders."""
    found: dict[str, Any] = {}
    for name, kind in (("search.pt", "search"), ("train.pt", "training")):
        found[name] = load_checkpoint(out / name, kind)
        del found[name]["seconds"]
    found["genotype"] = (out / "genotype.json").read_text()
    return found


def difference(a: Any, b: Any, where: str = "") -> str | None:
    """Where two results first differ in a bit, or None."""
    if isinstance(a, torch.Tensor):
        return None if a.dtype == b.dtype and torch.equal(a, b) else where
    if isinstance(a, dict | list | tuple):
        keys = a.keys() if isinstance(a, dict) else range(len(a))
        if len(a) != len(b) or (isinstance(a, dict) and a.keys() != b.keys()):
            return where
        found = (difference(a[k], b[k], f"{where}/{k}") for k in keys)
        return next((place for place in found if place is not None), None)
    return None if a == b else where


def one_line(error: str) -> str | None:
    """What is wrong with an error of the command line: it is one line, and no traceback."""
    if not error.startswith("fastnas: error: ") or error.count("\n") != 1:
        return f"no line of fastnas: {error!r}"
    return None


def left_behind(out: Path) -> str | None:
    """A temporary file that a run which has ended should have taken away."""
    stray = [path.name for path in out.rglob("*.partial")] if out.exists() else []
    return f"left {stray}" if stray else None


def main(text: str, count: int, run: Callable[[int, int], list[str]]) -> None:
    """A script's command line; exits with 1 where there is a fault.

    Args:
        text: what it does.
        count: how many times, by default.
        run: takes the count and a seed, returns the faults.
    """
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    faults = run(given.count, given.seed)
    for fault in faults:
        print(fault)
    print(f"{given.count} times, seed {given.seed}: {len(faults)} faults")
    sys.exit(bool(faults))
