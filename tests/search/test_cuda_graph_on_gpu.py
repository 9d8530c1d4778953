"""Steps captured for real, on a CUDA device."""

import pytest
import torch
from rich.console import Console
from step_cases import METHODS, SINGLE_PATH, build, search

from fastnas.backends import choose
from fastnas.ops import OPS
from fastnas.search.config import SearchConfig, make_config
from fastnas.search.cuda_graph import CudaRecorder, GraphedBilevel, why_not_graphed
from fastnas.search.searcher import Searcher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    """With S2, convolutions and skips only: torch's pools may sum in another order each time."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def recorder():
    return CudaRecorder(torch.device("cuda", 0))


def assert_close(ours, expected):
    torch.testing.assert_close(torch.tensor(ours[0]), torch.tensor(expected[0]))
    for a, b in zip(ours[1], expected[1]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [*METHODS, *SINGLE_PATH])
def test_replayed_steps_are_the_eager_steps(method):
    expected = search(6, build(method, device="cuda"), "cuda")
    bilevel = build(method, device="cuda")
    backend = choose(OPS["mixed_sum"], torch.device("cuda"), torch.float32)
    assert why_not_graphed(bilevel, backend) is None
    graphed = GraphedBilevel(bilevel, recorder())
    assert_close(search(6, graphed, "cuda"), expected)
    assert graphed.failure is None


def test_torchs_own_noise_is_drawn_anew():
    """S4's candidate draws from torch's CUDA generator, which replays advance."""
    ends = []
    for wrap in (lambda step: step, lambda step: GraphedBilevel(step, recorder())):
        ends.append(search(4, wrap(build("darts", "S4", device="cuda")), "cuda"))
    assert_close(ends[1], ends[0])


def test_a_read_on_the_host_falls_back(caplog):
    def build_reading():
        bilevel = build("darts", device="cuda")
        bilevel.strategy.regulariser = lambda arch: float(arch.normal.sum())
        return bilevel

    graphed = GraphedBilevel(build_reading(), recorder())
    assert_close(search(3, graphed, "cuda"), search(3, build_reading(), "cuda"))
    assert graphed.failure is not None and graphed.failure.startswith("capture failed: ")
    assert sum("capture failed" in r.getMessage() for r in caplog.records) == 1


def searcher_of(cuda_graph):
    settings = {
        "method": "noisy-darts", "noise_decay": "cosine", "space": "S2", "channels": 2,
        "layers": 3, "images": 96, "batch_size": 16, "epochs": 3, "tensorboard": False,
        "device": "cuda", "cuda_graph": cuda_graph,
    }  # fmt: skip
    return Searcher(make_config(SearchConfig, settings))


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_steps_are_queued_without_waiting(cuda_graph):
    """torch raises where a step waits for the device; the first two, which capture, may."""
    searcher = searcher_of(cuda_graph)
    searcher.start_epoch()
    for i in range(5):
        torch.cuda.set_sync_debug_mode("error" if i > 1 else "default")
        try:
            searcher.run_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_search(tmp_path):
    ends = []
    for cuda_graph in (False, True):
        searcher = searcher_of(cuda_graph)
        searcher.search(tmp_path, Console(quiet=True))
        assert searcher.is_graphed == cuda_graph
        ends.append([epoch["train_loss"] for epoch in searcher.history])
    assert ends[1] == pytest.approx(ends[0], rel=1e-4)
