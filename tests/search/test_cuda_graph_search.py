"""`--cuda-graph` changes no bit of a search: whole, resumed, and where there is no GPU."""

import logging

import pytest
from host_recorder import HostRecorder
from rich.console import Console
from tiny_runs import difference

from fastnas.search import searcher as searcher_module
from fastnas.search.checkpoint import load_checkpoint
from fastnas.search.config import SearchConfig, make_config
from fastnas.search.run_folder import claimed_folder
from fastnas.search.searcher import Searcher

pytestmark = pytest.mark.usefixtures("no_pictures")

TINY = {
    "space": "S2",
    "channels": 2,
    "layers": 3,
    "images": 96,
    "batch_size": 16,
    "epochs": 2,
    "tensorboard": False,
    "validate_every": 0,
}


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Searches on the CPU have capturable optimizers and may be recorded."""
    monkeypatch.setattr(searcher_module, "capturable_on", lambda device: True)
    monkeypatch.setattr(searcher_module, "why_not_graphed", lambda *_: None)
    monkeypatch.setattr(searcher_module, "CudaRecorder", HostRecorder)


class Stop(Exception):
    pass


def run(out, stop_after=None, resume=False, **settings):
    """The checkpoint that a search leaves, without its clock."""
    searcher = Searcher(make_config(SearchConfig, {**TINY, **settings}))
    path = out / "search.pt"
    if resume:
        searcher.resume(path)
    if stop_after is not None:
        make_step, steps = searcher.run_step, []

        def run_step():
            if len(steps) == stop_after:
                raise Stop
            steps.append(make_step())

        searcher.run_step = run_step
    out.mkdir(exist_ok=True)
    try:
        searcher.search(out, Console(quiet=True))
    except Stop:
        assert stop_after is not None
    assert searcher.is_graphed == settings.get("cuda_graph", False)
    found = load_checkpoint(path, "search")
    del found["seconds"]
    return found


SEARCHES = [
    {"method": "darts", "arch_start_epoch": 1},
    {"method": "noisy-darts", "noise_decay": "cosine"},
    {"method": "fair-darts"},
    {"method": "beta-darts"},
    {"method": "darts-minus"},
    {"method": "sdarts-rs"},
    {"method": "darts", "precision": "bf16", "cost": "macs:10", "cost_weight": 5.0},
]


@pytest.mark.parametrize("settings", SEARCHES, ids=lambda s: "-".join(map(str, s.values())))
def test_a_whole_search_and_one_resumed(as_on_cuda, tmp_path, settings):
    """Learning rate and noise decay over two epochs; stopped within one, gone on with or without
    graphs: every bit of the checkpoints is that of the search without graphs."""
    expected = run(tmp_path / "eager", **settings)
    whole = run(tmp_path / "graphed", cuda_graph=True, **settings)
    assert difference(whole, expected) is None
    for name, first in (("on", False), ("off", True)):
        out = tmp_path / name
        run(out, stop_after=4, checkpoint_every=1, cuda_graph=first, **settings)
        again = run(out, resume=True, cuda_graph=not first, **settings)
        assert difference(again, expected) is None, name


def test_resuming_drops_what_was_captured(as_on_cuda, tmp_path):
    expected = run(tmp_path / "run", method="darts", epochs=1)
    config = make_config(SearchConfig, {**TINY, "method": "darts", "cuda_graph": True, "epochs": 1})
    searcher = Searcher(config)
    searcher.start_epoch()
    searcher.run_step()
    fresh = Searcher(config)
    fresh.save(tmp_path / "start.pt")
    searcher.resume(tmp_path / "start.pt")
    searcher.search(tmp_path / "again", Console(quiet=True))
    found = load_checkpoint(tmp_path / "again/search.pt", "search")
    del found["seconds"]
    assert difference(found, expected) is None


def test_graphs_may_come_and_go_in_a_folder(tmp_path):
    settings = {**TINY, "out": str(tmp_path / "run")}
    for resume, more in ((False, {}), (True, {"cuda_graph": True})):
        with claimed_folder(make_config(SearchConfig, {**settings, **more}), resume):
            pass


def test_without_a_gpu_one_reason_is_logged(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "fastnas"):
        searcher = Searcher(
            make_config(SearchConfig, {**TINY, "device": "cpu", "cuda_graph": True, "epochs": 1})
        )
        searcher.search(tmp_path, Console(quiet=True))
    logged = [r.getMessage() for r in caplog.records if "CUDA graph" in r.getMessage()]
    assert logged == [
        "fastnas: the search runs without CUDA graphs: the search is on cpu; a CUDA device is"
        " needed"
    ]
    assert not searcher.is_graphed
