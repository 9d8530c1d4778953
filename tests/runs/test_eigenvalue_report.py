"""What a run says of the eigenvalue and of its early stop, and when it lacks the memory."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from fastnas.runs import eigenvalue_report
from fastnas.runs.search import run_search
from fastnas.search.config import ConfigError, SearchConfig, make_config
from fastnas.search.eigenvalue import EigenvalueMonitor
from fastnas.search.hessian import Eigenvalue
from fastnas.search.run_folder import claimed_folder
from fastnas.search.searcher import Searcher

pytestmark = pytest.mark.usefixtures("no_pictures", "one_thread")

QUIET = Console(quiet=True)
TINY = {
    "method": "darts", "space": "S2", "channels": 2, "layers": 1, "images": 32, "batch_size": 16,
    "tensorboard": False, "threads": 1, "validate_every": 3, "train_epochs": 0,
    "compare_steps": 0, "eigenvalue_every": 1,
}  # fmt: skip


def run(out, **settings):
    config = make_config(SearchConfig, {**TINY, "out": str(out), **settings})
    report = run_search(config, console=QUIET)
    assert json.loads((out / "report.json").read_text()) == report
    return report, (out / "report.md").read_text()


def test_the_report_tells_the_last_value(tmp_path):
    report, text = run(tmp_path / "run", epochs=1, eigenvalue_images=8)
    assert report["eigenvalue"] > 0 and report["eigenvalue_images"] == 8
    assert report["early_stop"] is None
    assert f"Hessian in the logits: {report['eigenvalue']:.4f} at the end, on 8 images" in text


def test_without_it_the_report_says_nothing(tmp_path):
    report, text = run(tmp_path / "run", epochs=1, eigenvalue_every=0)
    assert report["eigenvalue"] is report["eigenvalue_images"] is report["early_stop"] is None
    assert "eigenvalue" not in text


def test_the_report_tells_of_the_early_stop(tmp_path, monkeypatch):
    series = [1.0] * 13 + [1.5] * 7
    monkeypatch.setattr(
        EigenvalueMonitor, "_measure", lambda self, s: Eigenvalue(series[s.epoch], 0.0, 1)
    )
    report, text = run(tmp_path / "run", epochs=20, early_stop="eigenvalue", arch_lr=0.5)
    assert report["early_stop"] == {
        "decided": 16, "rollback": 10, "ratio": pytest.approx(1.4), "epochs": 20
    }  # fmt: skip
    # Epoch 10 was not validated: every third is.
    assert report["epochs"] == 17 and report["supernet_accuracy"] is None
    assert (
        "**The search stopped early after epoch 17 of 20: the eigenvalue has grown 1.40-fold;"
        " back to the logits of epoch 11**" in text
    )


def test_what_does_not_fit_is_refused_before_the_search(tmp_path, monkeypatch):
    monkeypatch.setattr(eigenvalue_report, "free_bytes", lambda device: 100_000)
    with pytest.raises(ConfigError, match=r"eigenvalue_images is 16, .* for at most \d+"):
        run(tmp_path / "run", epochs=1)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(eigenvalue_report, "free_bytes", lambda device: None)
    report, _ = run(tmp_path / "run", epochs=1)
    # What is finished needs no memory for a measurement.
    monkeypatch.setattr(eigenvalue_report, "free_bytes", lambda device: 100_000)
    settings = {**TINY, "out": str(tmp_path / "run"), "epochs": 1}
    again = run_search(make_config(SearchConfig, settings), resume=True, console=QUIET)
    assert again["eigenvalue"] == report["eigenvalue"]


def test_a_search_that_goes_on_is_refused_as_well(tmp_path, monkeypatch):
    config = make_config(SearchConfig, {**TINY, "out": str(tmp_path / "run"), "epochs": 2})
    with claimed_folder(config, False) as out:
        Searcher(config).save(out / "search.pt")
    monkeypatch.setattr(eigenvalue_report, "free_bytes", lambda device: 100_000)
    with pytest.raises(ConfigError, match="eigenvalue_images is 16"):
        run_search(config, resume=True, console=QUIET)
