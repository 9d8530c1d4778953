"""The comparison with eager: what it needs is told beforehand, and it never costs the report."""

import json

import pytest
import torch
from rich.console import Console

from fastnas.runs import compare, eager_memory
from fastnas.runs import search as runs
from fastnas.runs.compare import compare_with_eager
from fastnas.runs.eager_memory import eager_saved_bytes, free_bytes, why_eager_does_not_fit
from fastnas.search.config import SearchConfig, make_config
from fastnas.search.searcher import Searcher

pytestmark = pytest.mark.usefixtures("no_pictures")

TINY = {
    "space": "S2",
    "channels": 2,
    "layers": 3,
    "images": 64,
    "batch_size": 16,
    "epochs": 1,
    "train_epochs": 0,
    "tensorboard": False,
}
CPU = torch.device("cpu")


def searcher(**settings):
    return Searcher(make_config(SearchConfig, {**TINY, **settings}))


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "darts"},
        {"method": "noisy-darts", "space": "S0"},
        {"method": "noisy-darts", "noise_mixture": "multiplicative", "image_size": 11},
        {"method": "fair-darts", "space": "nb201", "layers": 1},
    ],
)
def test_the_estimate_is_what_eager_saves(settings):
    run = searcher(**settings)
    estimate = eager_saved_bytes(run)
    with run.on_backend():
        assert estimate == compare_with_eager(run, 1)["eager_saved_bytes"]


@pytest.mark.parametrize("space", ["S1", "nb201"])
def test_the_estimate_with_an_auxiliary_skip(space):
    """Besides what its network saves, a step saves the softmax that the skip is added to."""
    run = searcher(method="darts-minus", space=space, layers=1)
    estimate = eager_saved_bytes(run)
    with run.on_backend():
        measured = compare_with_eager(run, 1)["eager_saved_bytes"]
    own = sum(alpha.nbytes for alpha in run.arch.parameters())
    assert estimate < measured <= estimate + 2 * own


@pytest.mark.parametrize("method", ["gdas", "rome", "rome-v1"])
def test_no_sampled_path_holds_more_than_the_estimate(method):
    run = searcher(method=method, space="S0")
    estimate = eager_saved_bytes(run)
    with run.on_backend():
        measured = compare_with_eager(run, 1)["eager_saved_bytes"]
    assert measured <= estimate < 4 * measured


def test_the_estimate_draws_nothing_and_allocates_nothing():
    run = searcher(method="gdas", batch_size=16)
    run.train_batches.batch_size = 10**6  # gigabytes
    before = torch.get_rng_state()
    assert eager_saved_bytes(run) > 2**30
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_free(tmp_path):
    assert free_bytes(CPU, tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 16 kB\nMemAvailable:   8 kB\nCached: 4 kB\n")
    assert free_bytes(CPU, tmp_path) == 8 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1000\n")
    assert free_bytes(CPU, tmp_path) == 8 * 1024
    (group / "memory.max").write_text("5000\n")
    assert free_bytes(CPU, tmp_path) == 4000
    (group / "memory").mkdir()
    (group / "memory/memory.limit_in_bytes").write_text("900\n")
    (group / "memory/memory.usage_in_bytes").write_text("1000\n")
    assert free_bytes(CPU, tmp_path) == 0


def test_what_does_not_fit_is_said_with_its_figures(monkeypatch):
    run = searcher()
    assert why_eager_does_not_fit(run) is None
    saved, params = eager_saved_bytes(run), sum(p.nbytes for p in run.network.parameters())
    needed = int(1.35 * saved) + 4 * params
    monkeypatch.setattr(eager_memory, "free_bytes", lambda device: needed)
    assert why_eager_does_not_fit(run) is None
    monkeypatch.setattr(eager_memory, "free_bytes", lambda device: needed - 1)
    assert why_eager_does_not_fit(run) == (
        f"the eager step needs about {needed / 2**30:.1f} GiB, and {needed / 2**30:.1f} GiB are"
        " free on cpu"
    )
    monkeypatch.setattr(eager_memory, "free_bytes", lambda device: None)
    assert why_eager_does_not_fit(run) is None


def reported(out, **settings):
    config = make_config(SearchConfig, {**TINY, "compare_steps": 1, "out": str(out), **settings})
    report = runs.run_search(config, console=Console(quiet=True))
    assert json.loads((out / "report.json").read_text()) == report
    return report, (out / "report.md").read_text()


def test_a_comparison_that_does_not_fit_does_not_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(eager_memory, "free_bytes", lambda device: 0)
    monkeypatch.setattr(compare, "compare_with_eager", None)
    report, text = reported(tmp_path / "run")
    assert report["not_compared"].startswith("the eager step needs about ")
    assert report["step_speedup_vs_eager"] is None and report["genotype"]
    assert f"Not compared: {report['not_compared']}." in text
    assert report["not_compared"] in caplog.text


@pytest.mark.parametrize(
    "error", [RuntimeError("can't allocate memory:\nyou tried"), MemoryError(), ValueError("odd")]
)
def test_a_comparison_that_fails_costs_its_figures_only(error, tmp_path, monkeypatch):
    def failing(*_):
        raise error

    monkeypatch.setattr(compare, "compare_with_eager", failing)
    report, text = reported(tmp_path / "run")
    what = " ".join(str(error).split()) or "MemoryError"
    assert report["not_compared"] == f"the comparison failed: {what}"
    assert report["step_speedup_vs_eager"] is None and "the comparison failed" in text


def test_the_report_is_there_when_the_comparison_begins(tmp_path, monkeypatch):
    """What kills the process then, such as the system when memory runs out, finds it written."""
    left = []

    def killed(*_):
        left.append(json.loads((tmp_path / "run/report.json").read_text()))
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "compare_with_eager", killed)
    with pytest.raises(KeyboardInterrupt):
        reported(tmp_path / "run")
    assert left[0]["genotype"] and left[0]["not_compared"] == "it did not end"
    assert "Not compared: it did not end." in (tmp_path / "run/report.md").read_text()
