"""Searches for a distribution by gradient, cells on a supernet, and cells drawn from a report."""

import copy
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from fastnas.blackbox.config import StudyConfig
from fastnas.evaluators import EvaluationError
from fastnas.evaluators.supernet import SupernetEvaluator
from fastnas.nn import Paths
from fastnas.runs.sample import sampled_cells
from fastnas.runs.search import run_search
from fastnas.search.config import ConfigError, SearchConfig, make_config
from fastnas.search.searcher import Searcher
from fastnas.spaces import parse
from fastnas.spaces.distribution import OperationDistribution, slots_of
from fastnas.strategies.derivation import path_of

SMALL = {
    "space": "S2", "channels": 4, "layers": 3, "images": 96, "batch_size": 16, "epochs": 1,
    "train_epochs": 0, "compare_steps": 0, "tensorboard": False, "threads": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of an anasod search, and its report."""
    out = tmp_path_factory.mktemp("anasod") / "run"
    settings = {**SMALL, "method": "anasod-gdas", "final_cells": 3, "out": str(out)}
    config = make_config(SearchConfig, settings)
    return out, run_search(config, console=Console(quiet=True))


def drawn(searcher, count):
    rng, slots = np.random.default_rng(1), slots_of(searcher.space)
    return [OperationDistribution.dirichlet(slots, rng).sample(slots, rng) for _ in range(count)]


def test_the_supernets_best_cell_is_kept(run):
    out, report = run
    searcher = SupernetEvaluator.of_run(out).searcher
    cells = searcher.strategy.cells(searcher.arch, searcher.space, 3)
    found = SupernetEvaluator(searcher).evaluate(cells, range(3))
    best = max(range(3), key=lambda i: found[i].accuracy)
    assert parse(report["genotype"]) == cells[best]
    assert "| normal | sep_conv_3x3 |" in (out / "report.md").read_text()
    assert OperationDistribution.from_dict(report["distribution"]) == (
        searcher.strategy.distribution(searcher.arch, searcher.space)
    )


@pytest.mark.parametrize("space", ["S2", "nb201"])
def test_cells_together_are_cells_one_by_one(space, tmp_path):
    settings = {
        **SMALL,
        "method": "noisy-darts",
        "space": space,
        "layers": 3 if space == "S2" else 1,
    }
    searcher = Searcher(make_config(SearchConfig, {**settings, "out": str(tmp_path)}))
    before = copy.deepcopy(searcher.network.state_dict())
    evaluator = SupernetEvaluator(searcher)
    cells = drawn(searcher, 5)
    together = [e.accuracy for e in evaluator.evaluate(cells, range(5))]
    one_by_one = [evaluator.evaluate([cell], [0])[0].accuracy for cell in cells]
    assert together == one_by_one
    after = searcher.network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    correct = 0  # by hand: batch statistics, no noise
    network = evaluator.network
    for index, batch in searcher.plain(searcher.evaluation_index):
        path = path_of(cells[0], searcher.space)
        weights = {c: Paths(p, torch.ones(len(p))) for c, p in path.items()}
        with torch.no_grad():
            logits = network(batch, weights)
        correct += int((logits.argmax(1) == searcher.pipeline.images.train_labels[index]).sum())
    assert together[0] == pytest.approx(correct / len(searcher.evaluation_index))


def test_a_study_on_a_supernet(run, tmp_path):
    pytest.importorskip("optuna", reason="no Optuna")
    from fastnas.runs.study import run_study

    settings = {"method": "anasod-local", "evaluator": f"supernet:{run[0]}", "budget": 4}
    config = make_config(StudyConfig, {**settings, "out": str(tmp_path / "study")})
    report = run_study(config, console=Console(quiet=True))
    assert report["evaluations"] == 4 and report["evaluation_seconds"] > 0
    assert report["reported"] is None and 0 <= report["accuracy"] <= 1
    parse(report["genotype"])


def test_cells_are_drawn_from_a_report(run, tmp_path):
    report = run[0] / "report.json"
    lengths = {n: sampled_cells(report, n, 2, 0) for n in (4, 8, 16)}
    for n, texts in lengths.items():
        assert len(texts) == 2 and texts[0] != sampled_cells(report, n, 1, 1)[0]
        assert all(len(parse(text).edges("normal")) == n and "\n" not in text for text in texts)
    (tmp_path / "none.json").write_text(json.dumps({"genotype": "?"}))
    (tmp_path / "plain.json").write_text(json.dumps({"distribution": None}))
    (tmp_path / "half.json").write_text(json.dumps({"distribution": {"reduce": {"skip": 1.0}}}))
    (tmp_path / "broken.json").write_text(json.dumps({"distribution": {"normal": {"a": 0.7}}}))
    for name, message in (
        ("none", "distribution"),
        ("broken", "sum to 0.7"),
        ("plain", "its search was not for a distribution"),
        ("half", "is none of cells"),
        ("absent", "No such"),
    ):
        with pytest.raises(ConfigError, match=message):
            sampled_cells(tmp_path / f"{name}.json", None, 1, 0)
    for count, seed, message in ((0, 0, "count is 0"), (1, -1, "seed is -1")):
        with pytest.raises(ConfigError, match=message):
            sampled_cells(report, None, count, seed)


def test_a_cell_of_another_space_is_refused(run):
    cell = parse("|none~0|+|none~0|none~1|+|none~0|none~1|none~2|")
    with pytest.raises(EvaluationError, match=r"space S2 has no edge \(0, 1\)"):
        SupernetEvaluator.of_run(run[0]).evaluate([cell], [0])


def test_a_supernet_of_other_candidates_on_other_edges_is_refused(tmp_path):
    settings = {**SMALL, "space": "S1", "method": "darts", "out": str(tmp_path / "run")}
    run_search(make_config(SearchConfig, settings), console=Console(quiet=True))
    with pytest.raises(EvaluationError, match="space S1 offers other candidates on other edges"):
        SupernetEvaluator.of_run(tmp_path / "run")


def test_what_holds_no_search_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match="holds no search"):
        SupernetEvaluator.of_run(tmp_path)
