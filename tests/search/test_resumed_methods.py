"""Methods with a schedule, draws or an attack of their own: killed within an epoch, resumed to the
bit."""

import pytest
import torch
from rich.console import Console
from tiny_runs import difference

from fastnas.search.checkpoint import load_checkpoint
from fastnas.search.config import SearchConfig, make_config
from fastnas.search.searcher import Searcher

pytestmark = pytest.mark.usefixtures("no_pictures")

QUIET = Console(quiet=True)
TINY = {
    "channels": 2, "layers": 1, "images": 64, "batch_size": 16, "epochs": 3, "threads": 1,
    "checkpoint_every": 1, "tensorboard": False, "arch_lr": 0.1,
}  # fmt: skip
STEPS = 2
"""Of an epoch."""
METHODS = [
    ("fair-darts", "S3", {"single_level": True, "arch_start_epoch": 1}),
    ("fair-darts", "nb201", {"single_level": True}),
    ("drnas", "S2", {"order": 2}),
    ("drnas", "nb201", {"kl_weight": 0.1}),
    ("sdarts-rs", "S1", {}),
    ("sdarts-adv", "S2", {}),
    ("sdarts-adv", "nb201", {"attack_steps": 2}),
    ("darts-minus", "S1", {}),
    ("darts-minus", "nb201", {"auxiliary_decay": "cosine"}),
    ("beta-darts", "S1", {}),
    ("beta-darts", "nb201", {"order": 2}),
]


class KilledError(Exception):
    """Ends a run as a kill does: nothing more is written."""


def searched(out, stop=None, resume=False, **settings):
    """What the checkpoint of a search holds, without its clock."""
    out.mkdir(exist_ok=True)
    searcher = Searcher(make_config(SearchConfig, {**TINY, **settings}))
    if resume:
        torch.manual_seed(99)
        searcher.resume(out / "search.pt")
    run_step, done = searcher.run_step, []

    def step():
        if len(done) == stop:
            raise KilledError
        run_step()
        done.append(1)

    searcher.run_step = step
    if stop is None:
        searcher.search(out, QUIET)
    else:
        with pytest.raises(KilledError):
            searcher.search(out, QUIET)
    found = load_checkpoint(out / "search.pt", "search")
    del found["seconds"]
    return found


@pytest.mark.parametrize("stop", [1, STEPS, STEPS + 1, 3 * STEPS, 5 * STEPS + 1])
@pytest.mark.parametrize("space", ["S2", "nb201"])
def test_a_method_that_decides_is_killed(space, stop, tmp_path):
    """Within the first stage, at its end, between two decisions and within an epoch after one."""
    settings = {"method": "darts-pt", "space": space, "tune_epochs": 1, "epochs": 2}
    whole = searched(tmp_path / "whole", **settings)
    out = tmp_path / "killed"
    searched(out, stop=stop, **settings)
    assert difference(searched(out, resume=True, **settings), whole) is None


@pytest.mark.parametrize(("method", "space", "options"), METHODS, ids=str)
def test_a_killed_search_ends_in_the_same_bits(method, space, options, tmp_path):
    settings = {"method": method, "space": space, **options}
    whole = searched(tmp_path / "whole", **settings)
    out = tmp_path / "killed"
    part = searched(out, stop=STEPS + 1, **settings)
    assert (part["epoch"], part["step"]) == (1, 1)
    assert difference(searched(out, resume=True, **settings), whole) is None
    other = searched(tmp_path / "other", seed=1, **settings)
    assert difference(other["network"], whole["network"]) is not None
