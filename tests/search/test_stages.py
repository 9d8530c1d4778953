"""A search of several stages: each has its own space, depth and epochs, and resumes to the bit."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console

from fastnas.bounds import whole as whole_number
from fastnas.options import option
from fastnas.search.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from fastnas.search.config import SearchConfig, make_config
from fastnas.search.searcher import Searcher
from fastnas.strategies import STRATEGIES
from fastnas.strategies.base import Stage
from fastnas.strategies.mixture import Mixture

pytestmark = pytest.mark.usefixtures("no_pictures")

QUIET = Console(quiet=True)
TINY = {
    "method": "shrinking", "space": "S3", "channels": 2, "layers": 1, "images": 64,
    "batch_size": 16, "epochs": 1, "tensorboard": False, "threads": 1, "checkpoint_every": 1,
    "validate_every": 0,
}  # fmt: skip
STEPS = 2
"""Of an epoch."""


@pytest.fixture(scope="module", autouse=True)
def method():
    class Shrinking(Mixture):
        """A deeper network in its second stage, on the best candidates of the first."""

        name = "shrinking"
        source = "a test"
        kept: int = option(2, "candidates of every edge in the second stage", whole_number(1, 8))

        def stages(self, layers, epochs):
            return [Stage(layers, epochs), Stage(layers + 2, epochs + 1)]

        def start_stage(self, stage):
            self.stage = stage

        def mixing_weights(self, arch):
            return {cell: (a * (1 + self.stage)).softmax(-1) for cell, a in arch.alphas().items()}

        def next_space(self, space, arch):
            best = {
                cell: tuple(
                    tuple(names[k] for k in row.topk(self.kept).indices.sort().values)
                    for names, row in zip(space.candidates(cell), alpha)
                )
                for cell, alpha in arch.alphas().items()
            }
            return replace(space, name="shrunk", **best)

    yield Shrinking
    del STRATEGIES["shrinking"]


class KilledError(Exception):
    """Ends a run as a kill does: nothing more is written."""


def config(out, **settings):
    return make_config(SearchConfig, {**TINY, "out": str(out), **settings})


def left(searcher):
    """Everything that a search leaves, as tensors and plain figures."""
    states = [searcher.network.state_dict(), searcher.arch.state_dict(), *searcher.past_logits]
    figures = [{**figures} for figures in searcher.history]
    return [t for state in states for t in state.values()], searcher.space, figures


@pytest.fixture(scope="module")
def whole(tmp_path_factory, method):
    searcher = Searcher(config(tmp_path_factory.mktemp("whole")))
    assert searcher.epochs == 3 and len(searcher.network.cells) == 1
    first = searcher.space, searcher.network, searcher.arch, searcher.arch_optimizer
    searcher.search(tmp_path_factory.mktemp("out"), QUIET)
    return searcher, first


def test_a_stage_has_its_own_of_everything(whole):
    searcher, (space, network, arch, optimizer) = whole
    assert searcher.stage == 1 and searcher.finished
    assert searcher.space.name == "shrunk"
    assert (space.num_candidates("normal"), searcher.space.num_candidates("normal")) == (3, 2)
    assert len(searcher.network.cells) == 3 and searcher.network is not network
    assert searcher.arch.normal.shape == (14, 2)
    assert torch.equal(searcher.past_logits[0]["normal"], arch.normal)
    steps = {int(state["step"]) for state in searcher.arch_optimizer.state.values()}
    assert searcher.arch_optimizer is not optimizer and steps == {2 * STEPS}


def test_a_stage_has_its_own_schedule(whole):
    """The learning rate begins anew: one epoch of the first stage, two of the second."""
    lr = [figures["lr"] for figures in whole[0].history]
    assert lr[0] == lr[1] == 0.025 and lr[2] == pytest.approx((0.025 + 0.001) / 2)
    assert [figures["epoch"] for figures in whole[0].history] == [0, 1, 2]


@pytest.mark.parametrize("stop", ["epoch 0", 1, STEPS, 2 * STEPS + 1])
def test_an_interrupted_search_ends_in_the_same_bits(tmp_path, whole, stop):
    """Stopped before each step, and between the last step of the first stage and its end."""
    stopped = Searcher(config(tmp_path))
    run_step, end_epoch, done = stopped.run_step, stopped.end_epoch, []

    def step():
        if len(done) == stop:
            raise KilledError
        run_step()
        done.append(1)

    def end():
        if stop == "epoch 0":
            raise KilledError
        return end_epoch()

    stopped.run_step, stopped.end_epoch = step, end
    with pytest.raises(KilledError):
        stopped.search(tmp_path, QUIET)
    torch.manual_seed(99)
    again = Searcher(config(tmp_path))
    again.resume(tmp_path / "search.pt")
    assert again.stage == (0 if stop in ("epoch 0", 1) else 1)
    again.search(tmp_path, QUIET)
    ours, expected = left(again), left(whole[0])
    assert len(ours[0]) == len(expected[0]) and ours[1:] == expected[1:]
    assert all(torch.equal(a, b) for a, b in zip(ours[0], expected[0]))


def test_a_state_of_another_stage_is_refused(tmp_path):
    searcher = Searcher(config(tmp_path))
    searcher.search(tmp_path, QUIET)
    state = load_checkpoint(tmp_path / "search.pt", "search")
    del state["kind"]
    for past, message in [([], "past_logits are those of 0 stages, not of 1"),
                          ([{"normal": torch.zeros(3)}], "does not fit this run")]:  # fmt: skip
        save_checkpoint(tmp_path / "bad.pt", "search", {**state, "past_logits": past})
        with pytest.raises(CheckpointError, match=message):
            Searcher(config(tmp_path)).resume(tmp_path / "bad.pt")


def test_a_run_that_has_ended_goes_back_to_its_first_stage(tmp_path, whole):
    searcher = Searcher(config(tmp_path))
    searcher.save(tmp_path / "start.pt")
    for _ in range(2):
        searcher.search(tmp_path, QUIET)
        assert searcher.stage == 1 and searcher.space == whole[0].space
        assert torch.equal(searcher.arch.normal, whole[0].arch.normal)
        searcher.resume(tmp_path / "start.pt")
        assert searcher.stage == 0 and searcher.space.num_candidates("normal") == 3
