"""Every mixture steps in every space that it searches, on fused cells wherever a space has none but
known operations, and derives a cell."""

import pytest
import torch
from rich.console import Console

from fastnas.search.config import SearchConfig, make_config
from fastnas.search.searcher import Searcher
from fastnas.spaces import SPACES

METHODS = ["beta-darts", "darts-minus", "darts-pt", "drnas", "sdarts-adv", "sdarts-rs"]
TINY = {"channels": 2, "images": 32, "batch_size": 16, "epochs": 1, "tensorboard": False}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", METHODS)
def test_a_search_of_one_step(method, space, tmp_path, no_pictures):
    layers = 1 if space == "nb201" else 3
    settings = {**TINY, "method": method, "space": space, "layers": layers}
    settings |= {"tune_epochs": 1} if method == "darts-pt" else {}
    searcher = Searcher(make_config(SearchConfig, settings))
    weights = [p.detach().clone() for p in searcher.network.parameters()]
    logits = [p.detach().clone() for p in searcher.arch.parameters()]
    image = torch.randn(2, 2, 8, 8)
    reasons = {dag.why_not_fused(image) for dag in searcher.network.dags()}
    assert (
        all("noise" in reason.lower() for reason in reasons) if space == "S4" else reasons == {None}
    )
    searcher.search(tmp_path, Console(quiet=True))
    assert searcher.finished and searcher.genotype()
    moved = [torch.equal(a, b) for a, b in zip(weights, searcher.network.parameters())]
    assert not all(moved)
    assert not any(torch.equal(a, b) for a, b in zip(logits, searcher.arch.parameters()))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", [*METHODS, "fair-darts"])
def test_a_search_in_16_bits_that_pays_for_its_cost(method, precision, tmp_path, no_pictures):
    """Where fp16 skips steps at first, as the scale of its loss is found, others are made."""
    settings = {**TINY, "method": method, "space": "S2", "layers": 3, "precision": precision}
    settings |= {"epochs": 3}
    settings |= {"cost": "params:1", "cost_weight": 3.0, "train_channels": 2, "train_layers": 3}
    settings |= {"tune_epochs": 1} if method == "darts-pt" else {}
    settings |= {"single_level": True} if method == "fair-darts" else {}
    searcher = Searcher(make_config(SearchConfig, settings))
    logits = [p.detach().clone() for p in searcher.arch.parameters()]
    weights = [p.detach().clone() for p in searcher.network.parameters()]
    searcher.search(tmp_path, Console(quiet=True))
    assert not any(torch.equal(a, b) for a, b in zip(logits, searcher.arch.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(weights, searcher.network.parameters()))
    steps = len(searcher.history) * searcher.steps_per_epoch
    for name in ("skipped_weight_steps", "skipped_logit_steps"):
        assert sum(figures.get(name, 0) for figures in searcher.history) < steps
