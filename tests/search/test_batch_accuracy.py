"""The accuracy that decides: eager's in training mode on whole, mixed batches; nothing moves."""

import pytest
import torch
from rich.console import Console

from fastnas import nn, reference
from fastnas.processes import ALONE
from fastnas.search.batch_accuracy import batch_accuracy, mixed_in_whole_batches
from fastnas.search.config import SearchConfig, make_config
from fastnas.search.searcher import Searcher
from fastnas.spaces import get_space

SPACE = get_space("S2")


def given(batches=3, size=8):
    torch.manual_seed(0)
    return [(torch.randn(size, 3, 8, 8), torch.randint(4, (size,))) for _ in range(batches)]


def test_it_is_eagers_by_the_statistics_of_each_batch():
    network = nn.SearchNetwork(SPACE, 2, 4, 3).eval()
    eager = reference.SearchNetwork(SPACE, 2, 4, 3).train()
    eager.load_state_dict(network.state_dict())
    weights = {cell: torch.rand(14, 2) for cell in SPACE.cell_types}
    before = {name: b.clone() for name, b in network.named_buffers()}
    found = batch_accuracy(network, weights, given(), ALONE)
    right = sum(int((eager(x, weights).argmax(1) == y).sum()) for x, y in given())
    assert found == right / 24
    assert not network.training
    assert all(torch.equal(b, before[name]) for name, b in network.named_buffers())


def test_what_is_not_finite_is_no_accuracy():
    network = nn.SearchNetwork(SPACE, 2, 4, 3)
    network.classifier.weight.data.fill_(float("nan"))
    weights = {cell: torch.rand(14, 2) for cell in SPACE.cell_types}
    assert batch_accuracy(network, weights, given(), ALONE) is None


def test_images_are_mixed_in_whole_batches():
    index = torch.arange(100, 123)
    found = mixed_in_whole_batches(index, 5, seed=1)
    assert len(found) == 20 and len(set(found.tolist())) == 20
    assert set(found.tolist()) < set(index.tolist())
    assert found.tolist() != sorted(found.tolist())
    assert torch.equal(found, mixed_in_whole_batches(index, 5, seed=1))
    assert not torch.equal(found, mixed_in_whole_batches(index, 5, seed=2))


def test_a_search_goes_on_with_its_network_and_decides(tmp_path, no_pictures):
    """Each decision is the first of the lowest accuracies that were measured before it."""
    settings = {
        "method": "darts-pt", "space": "nb201", "channels": 2, "layers": 1, "images": 64,
        "batch_size": 16, "epochs": 2, "tune_epochs": 1, "arch_start_epoch": 1, "lr": 0.2,
        "threads": 1, "tensorboard": False,
    }  # fmt: skip
    searcher = Searcher(make_config(SearchConfig, settings))
    network, arch, optimizers = searcher.network, searcher.arch, searcher.params_optimizer
    of_logits = searcher.arch_optimizer
    measured, asked = searcher._accuracy_on, []

    def accuracy(weights):
        before = {name: b.clone() for name, b in network.named_buffers()}
        asked.append(measured(weights))
        assert all(torch.equal(b, before[name]) for name, b in network.named_buffers())
        assert network.training
        return asked[-1]

    searcher._accuracy_on = accuracy
    decided = []
    start = searcher.start_epoch

    def start_epoch():
        before = list(searcher.strategy.operations["normal"])
        asked.clear()
        start()
        after = searcher.strategy.operations["normal"]
        decided.append([k for k, old in zip(after, before) if k != old])
        assert decided[-1] == ([asked.index(min(asked))] if asked else [])

    searcher.start_epoch = start_epoch
    searcher.search(tmp_path, Console(quiet=True))
    assert searcher.epochs == 2 + 6 and [len(found) for found in decided] == [0] * 2 + [1] * 6
    assert searcher.network is network and searcher.arch is arch
    assert searcher.arch_optimizer is of_logits and searcher.params_optimizer is not optimizers
    # The logits stood still for one epoch of the network, not for one of each stage.
    assert {int(s["step"]) for s in of_logits.state.values()} == {7 * 2}
    rates = [figures["lr"] for figures in searcher.history]
    assert rates[0] == 0.2 and rates[2:] == pytest.approx([0.02] * 6)
    first = searcher.past_logits[0]["normal"]
    assert not torch.equal(first, arch.normal)
    names = searcher.space.candidates("normal")[0]
    ops = [op for op, _, _ in searcher.genotype().edges()]
    assert ops == [names[k] for k in searcher.strategy.operations["normal"]]
