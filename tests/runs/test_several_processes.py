"""A run of several processes: its files, its resumption after one was killed, its errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from forked import together

from fastnas.processes import here
from fastnas.runs.search import run_search, run_train
from fastnas.search.checkpoint import load_checkpoint
from fastnas.search.config import SearchConfig, TrainConfig, make_config
from fastnas.search.resumable import ResumableRun

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")

SETTINGS = {
    "space": "S2",
    "channels": 2,
    "layers": 1,
    "images": 128,
    "batch_size": 16,
    "epochs": 2,
    "train_epochs": 1,
    "train_channels": 2,
    "train_layers": 1,
    "train_batch_size": 64,
    "checkpoint_every": 2,
    "compare_steps": 0,
    "tensorboard": False,
}


def search(out, dies_at=None, resume=False, **settings):
    """A process of a run; its last process kills itself in a step."""

    def work():
        config = make_config(SearchConfig, {**SETTINGS, "out": str(out), **settings})
        if dies_at is not None and here().rank == here().size - 1:
            make = ResumableRun.make_step
            done = []

            def step(run):
                done.append(run)
                if len(done) == dies_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                make(run)

            ResumableRun.make_step = step
        return run_search(config, resume=resume)

    return work


def results(out):
    found = [
        load_checkpoint(out / f, k) for f, k in (("search.pt", "search"), ("train.pt", "training"))
    ]
    for state in found:
        del state["seconds"], state["run"]
    return [leaf for state in found for leaf in torch.utils._pytree.tree_leaves(state)]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.equal(y) if torch.is_tensor(x) else x == y


def figures(report):
    clocks = ("search_seconds", "train_seconds", "latency_ms")
    return {name: value for name, value in report.items() if name not in clocks}


DECIDES = {"method": "darts-pt", "space": "nb201", "tune_epochs": 1, "epochs": 1, "images": 64}


@pytest.mark.parametrize(
    "settings", [{}, {"method": "rome", "samples": 2, "spread": "samples"}, DECIDES]
)
def test_a_run_that_lost_a_process_goes_on(settings, tmp_path):
    whole = together(2, search(tmp_path / "whole", **settings), tmp_path)
    assert isinstance(whole[0], dict), whole[0]
    assert figures(whole[0]) == figures(whole[1])
    assert json.loads((tmp_path / "whole/report.json").read_text())["environment"]["processes"] == 2
    # In the second epoch, of four steps, after the checkpoint of its second one; or in the fourth,
    # of two steps, after a decision.
    out = tmp_path / "run"
    told, dead = together(2, search(out, dies_at=7, **settings), tmp_path)
    assert told.startswith("ProcessesError: process 0 of 2 has lost another"), told
    assert dead is None
    again = together(2, search(out, resume=True, **settings), tmp_path)
    assert figures(again[0]) == figures(whole[0])
    assert_same(results(out), results(tmp_path / "whole"))


def test_it_goes_on_with_another_number_and_says_so(tmp_path, caplog):
    out = tmp_path / "run"
    together(4, search(out, dies_at=7), tmp_path)
    report = search(out, resume=True, threads=2)()
    warning = "this search was made by 4 processes and goes on with 1"
    assert len([text for text in caplog.messages if warning in text]) == 1
    assert report["epochs"] == 2


def refused(**settings):
    def work():
        run_search(make_config(SearchConfig, settings))

    return work


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"batch_size": 15}, "batch_size is 15; a multiple of 2, the number of processes that"),
        ({"train_batch_size": 9}, "train_batch_size is 9; a multiple of 2, the number of"),
        ({"spread": "samples"}, "spread is 'samples', but method noisy-darts has no samples"),
        ({"device": "cuda:0"}, "device is 'cuda:0'; of several processes each has a GPU"),
    ],
)
def test_what_several_processes_cannot_do(settings, text, tmp_path):
    work = refused(**{**SETTINGS, "out": str(tmp_path / "run"), **settings})
    for told in together(2, work, tmp_path):
        assert text in told.splitlines()[0]
    assert not (tmp_path / "run").exists()


def test_a_training_of_two(tmp_path):
    genotype = str(tmp_path / "genotype.txt")
    cell = "('skip_connect', 0), ('sep_conv_3x3', 1)"
    text = ", ".join(
        f"{name}=[{', '.join([cell] * 4)}], {name}_concat=range(2, 6)"
        for name in ("normal", "reduce")
    )
    (tmp_path / "genotype.txt").write_text(f"Genotype({text})")

    def trained(out):
        def work():
            config = TrainConfig(
                genotype=genotype, out=str(tmp_path / out), channels=2, layers=1, epochs=1,
                images=51, auxiliary=False, tensorboard=False,
            )  # fmt: skip
            return figures(run_train(config))

        return work

    first, second = together(2, trained("two"), tmp_path)
    assert first == second
    assert first["test_images"] == 359
    (alone,) = together(1, trained("one"), tmp_path)
    # Each has batch norms of its own, so that the results are near and not the same.
    assert alone["parameters"] == first["parameters"]


@pytest.mark.slow
def test_torchrun(tmp_path):
    """The command line joins what torchrun has started, and is refused in one line."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text("{}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "fastnas", "search", "--batch-size=16", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode
    told = [line for line in done.stderr.splitlines() if line.startswith("fastnas:")]
    assert told == [
        f"fastnas: error: {out} holds a run; continue it with --resume, or name another folder"
        " with --out"
    ]
