"""Runs a whole search at its published setting by `fastnas search`; its record is JSON.

    python -m fastnas.benchmarks.search.whole FILE.npz OUT --method rome --seconds 500

Stopped by its time limit, a second call goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from fastnas.benchmarks.harness.schema import current_conditions
from fastnas.files import write_text
from fastnas.search.checkpoint import CheckpointError, load_checkpoint
from fastnas.search.gradient_run import CHECKPOINT

METHOD = "noisy-darts"
EPOCHS = 50
KEPT = ("epoch", "skips_normal", "skips_reduce", "train_loss", "train_accuracy", "valid_accuracy")


def command(given: argparse.Namespace, run: Path, options: Sequence[str]) -> list[str]:
    """Returns the command of the search alone: no training of what it finds, no comparison."""
    flags = ["--method", given.method, "--data", given.data, "--epochs", str(given.epochs)]
    # With --resume one command both begins a search and goes on with it.
    flags += ["--device", given.device, "--out", str(run), "--resume", "--no-tensorboard"]
    flags += ["--train-epochs", "0", "--compare-steps", "0", *options]
    if given.device == "cuda":
        flags.append("--cuda-graph")
    return [sys.executable, "-m", "fastnas", "search", *flags]


def record(run: Path, wall_seconds: float, device: str) -> dict[str, Any]:
    """Reads what the search has found so far.

    Raises:
        CheckpointError: there is no checkpoint yet, or it is broken.
    """
    state = load_checkpoint(run / CHECKPOINT, "search")
    config = json.loads((run / "config.json").read_text())
    history, conditions = state["history"], current_conditions(device)
    last = history[-1] if history else {}
    return {
        "device": conditions.device,
        "driver": conditions.driver,
        "torch": conditions.torch,
        "commit": conditions.commit,
        "finished": state["epoch"] == config["epochs"],
        "epochs_done": state["epoch"],
        "step_seconds": state["seconds"],
        "wall_seconds": wall_seconds,
        "genotype": last.get("genotype"),
        "supernet_accuracy": last.get("valid_accuracy"),
        "epochs": [{name: figures.get(name) for name in KEPT} for figures in history],
        "config": config,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="FILE.npz of images, or a data set that fastnas search knows")
    parser.add_argument("out", type=Path, help="folder of METHOD.json and of the run, METHOD/")
    parser.add_argument("--method", default=METHOD)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seconds", type=float, default=None, help="stop after so long")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    given, options = parser.parse_known_args(arguments)
    run, path = given.out / given.method, given.out / f"{given.method}.json"
    # The wall time of a search in several calls is their sum.
    before = json.loads(path.read_text())["wall_seconds"] if path.exists() else 0.0
    start = perf_counter()
    try:
        code = subprocess.run(
            command(given, run, options), timeout=given.seconds, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        # The time limit is no failure: the checkpoint has what was done by then.
        code = 0
    if code != 0:
        return code
    try:
        found = record(run, before + perf_counter() - start, given.device)
    except CheckpointError as error:
        print(f"whole: no epoch was finished in time: {error}", file=sys.stderr)
        return 1
    write_text(path, json.dumps(found, indent=2) + "\n")
    print(f"{found['epochs_done']} of {given.epochs} epochs, {found['wall_seconds']:.0f} s: {path}")
    if not found["finished"]:
        print("not finished: the same command again goes on from here", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
