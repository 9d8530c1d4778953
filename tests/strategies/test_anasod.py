"""Logits tied across edges: the distribution that they say, and the cells of it."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from fastnas.nn import ArchParameters, EvalNetwork, Paths
from fastnas.spaces import get_space
from fastnas.spaces.darts import DartsSlots
from fastnas.spaces.distribution import OperationDistribution, slots_of
from fastnas.strategies import get_strategy
from fastnas.strategies.derivation import derive_path, path_of

METHODS = ("anasod-darts", "anasod-gdas")


def arch_of(name, space, scale=1.0):
    torch.manual_seed(0)
    strategy = get_strategy(name)
    return strategy, ArchParameters(space, scale, strategy.topology, strategy.tied)


@pytest.mark.parametrize("space", ["S0", "S2", "nb201"])
@pytest.mark.parametrize("name", METHODS)
def test_the_edges_share_their_logits(name, space):
    space = get_space(space)
    strategy, arch = arch_of(name, space)
    assert [p.shape[0] for p in arch.parameters()] == [1] * len(space.cell_types)
    weights = strategy.mixing_weights(arch)
    gradient = torch.randn_like(weights["normal"])
    (weights["normal"] * gradient).sum().backward()
    w = weights["normal"][0].detach()
    total = gradient.sum(0)
    expected = w * (total - (w * total).sum())
    torch.testing.assert_close(arch.normal.grad[0], expected)
    assert weights["normal"].shape == (len(space.edges), space.num_candidates("normal"))
    assert (weights["normal"] == weights["normal"][0]).all()


@pytest.mark.parametrize("name", METHODS)
def test_the_distribution_is_softmax_without_none(name):
    space = get_space("S0")
    strategy, arch = arch_of(name, space)
    found = strategy.distribution(arch, space)
    w = torch.softmax(arch.reduce[0].double(), 0)[1:]
    assert space.candidates("reduce")[0][0] == "none" and "none" not in found.ops
    assert found.p["reduce"] == pytest.approx((w / w.sum()).tolist())
    cells = strategy.cells(arch, space, 5)
    assert cells[0] == strategy.derive(arch, space) and len(set(cells)) > 1
    for cell in cells:
        assert OperationDistribution.of(cell, slots_of(space)).counts(8) == found.counts(8)


def test_all_edges_of_a_sample_follow_the_distribution():
    space = get_space("S2")
    strategy, arch = arch_of("anasod-gdas", space)
    strategy.start_epoch(0, 2)
    paths = strategy.forward_weights(arch)["normal"]
    assert isinstance(paths, Paths)
    drawn = torch.cat([strategy.forward_weights(arch)["normal"].choice for _ in range(400)])
    shares = torch.softmax(arch.normal[0].detach().double(), 0).numpy()
    counts = np.bincount(drawn.numpy(), minlength=len(shares))
    assert chisquare(counts, shares / shares.sum() * counts.sum()).pvalue > 1e-3


def test_a_cell_and_its_path():
    space, rng = get_space("S0"), np.random.default_rng(0)
    for _ in range(20):
        cell = OperationDistribution.dirichlet(slots_of(space), rng).sample(slots_of(space), rng)
        path = path_of(cell, space)
        again = derive_path(path, space)
        for cell_type in ("normal", "reduce"):
            assert int((path[cell_type] >= 0).sum()) == 8
            assert [set(n) for n in again.nodes(cell_type)] == [
                set(n) for n in cell.nodes(cell_type)
            ]
    longer = OperationDistribution.dirichlet(DartsSlots(("skip_connect",), 10), rng)
    with pytest.raises(ValueError, match=r"space S0 has no edge \("):
        path_of(longer.sample(DartsSlots(("skip_connect",), 10), rng), space)


@pytest.mark.parametrize("length", [4, 8, 16])
def test_cells_of_any_length_train(length):
    strategy, arch = arch_of("anasod-darts", get_space("S0"))
    found, slots = strategy.distribution(arch, get_space("S0")), slots_of(get_space("S0"), length)
    cell = found.sample(slots, np.random.default_rng(0))
    network = EvalNetwork(cell, 8, 10, 3, auxiliary=False)
    logits, _ = network(torch.randn(4, 3, 16, 16))
    logits.logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_what_is_refused():
    with pytest.raises(ValueError, match="space S1 offers other candidates on other edges"):
        get_strategy("anasod-darts").space(get_space("S1"))
    with pytest.raises(ValueError, match="final_cells is 0; a whole number is needed, 1 to 100000"):
        get_strategy("anasod-gdas", final_cells=0)
