"""What a checkpoint tells of its run: another run, or a state that no run has saved, is refused."""

import math

import numpy as np
import pytest
import torch
from rich.console import Console

from fastnas.runs.search import run_search
from fastnas.search.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from fastnas.search.config import SearchConfig, make_config
from fastnas.search.run_folder import RunFolderError
from fastnas.search.searcher import Searcher

pytestmark = pytest.mark.usefixtures("no_pictures")

QUIET = Console(quiet=True)
TINY = {
    "space": "S2", "channels": 2, "layers": 1, "images": 64, "batch_size": 16, "epochs": 2,
    "train_epochs": 0, "compare_steps": 0, "tensorboard": False, "threads": 1,
}  # fmt: skip


def config(out, **settings):
    return make_config(SearchConfig, {**TINY, "out": str(out), **settings})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A searcher, a state that a search of it has saved, and where to save another."""
    out = tmp_path_factory.mktemp("run")
    searcher = Searcher(config(out))
    searcher.search(out, QUIET)
    state = load_checkpoint(out / "search.pt", "search")
    del state["kind"]
    return searcher, state, out / "changed.pt"


ABSENT = object()


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("epoch", -5, "epoch is -5 of 2"),
        ("epoch", 10**9, "epoch is 1000000000 of 2"),
        ("epoch", 1.0, "epoch is no int"),
        ("step", 1, "step is 1"),  # the run is at its end
        ("step", ABSENT, "step is missing"),
        ("history", [], "of which 0 are told"),
        ("history", [1, 2], "the figures of epoch 0 are not told"),
        ("history.0.epoch", torch.zeros(2), "the figures of epoch 0 are not told"),
        ("history.1.skips_normal", ABSENT, "skips_normal of epoch 1 is None"),
        ("history.1.genotype", 3, "genotype of epoch 1 is 3"),
        ("history.1.lr", math.nan, "lr of epoch 1 is no finite number"),
        ("seconds", math.inf, "not finite numbers"),
        ("sums.train_loss", "x", "not finite numbers"),
        ("sums.train_loss", ABSENT, "not finite numbers"),
        ("run", [], "run is no dict"),
        ("run.seed", torch.zeros(2), "run holds what is no setting"),
        ("run.seed", 7, "of another run: seed 7 -> 0"),
        ("random.torch", torch.zeros(3), "does not fit this run"),
        ("random.numpy", [], "does not fit this run"),
        ("arch.normal", torch.full((14, 2), math.nan), "arch.normal is not finite"),
        ("arch.normal", None, "does not fit this run"),
        ("params_optimizer.state.0.momentum_buffer", "x", "momentum_buffer does not fit"),
        ("arch_optimizer.state.0.exp_avg", torch.zeros(3), "exp_avg does not fit"),
        ("train_batches.position", 10**6, "does not fit this run"),
        ("augment", torch.zeros(2), "does not fit this run"),
    ],
)
def test_a_state_that_no_run_has_saved(run, where, value, message):
    searcher, state, path = run
    save_checkpoint(path, "search", state)
    changed = load_checkpoint(path, "search")
    del changed["kind"]
    *parents, last = (int(name) if name.isdigit() else name for name in where.split("."))
    inner = changed
    for name in parents:
        inner = inner[name]
    if value is ABSENT:
        del inner[last]
    else:
        inner[last] = value
    save_checkpoint(path, "search", changed)
    with pytest.raises(CheckpointError, match=message) as caught:
        searcher.resume(path)
    assert "\n" not in str(caught.value)


def archive(path, seed):
    drawn = np.random.default_rng(seed).integers(0, 256, (80, 8, 8, 1), dtype=np.uint8)
    np.savez(path, images=drawn, labels=np.arange(80) % 4)


def test_all_that_differs_is_named_in_one_message(tmp_path):
    """Settings, the number of threads that the run really has, and what is in its data file."""
    data = tmp_path / "images.npz"
    archive(data, 0)
    run_search(config(tmp_path / "run", data=str(data)), console=QUIET)
    archive(data, 1)
    kept = (tmp_path / "run/search.pt").read_bytes()
    other = config(tmp_path / "run", data=str(data), threads=2, seed=3, lr=0.5)
    threads = torch.get_num_threads()
    with pytest.raises(RunFolderError, match="holds another run: ") as caught:
        run_search(other, resume=True, console=QUIET)
    torch.set_num_threads(threads)
    for text in ("seed 0 -> 3", "lr None -> 0.5", "threads 1 -> 2", "fingerprint of the data '"):
        assert text in str(caught.value)
    assert (tmp_path / "run/search.pt").read_bytes() == kept
    archive(data, 0)
    same = config(tmp_path / "run", data=str(data), checkpoint_every=3)
    assert run_search(same, resume=True, console=QUIET)["genotype"]
