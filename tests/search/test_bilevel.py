"""The bilevel step: pruned gradients are the full ones, and nothing else is computed."""

import pytest
import torch
import torch.nn.functional as F

from fastnas import nn, reference
from fastnas.search.bilevel import Bilevel
from fastnas.spaces import get_space
from fastnas.strategies import get_strategy
from fastnas.strategies.steps import ArchStep, Inputs

SPACE = get_space("S3")


def build(network, arch, strategy):
    params = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=3e-4)
    alphas = torch.optim.Adam(arch.parameters(), 0.01, betas=(0.5, 0.999), weight_decay=1e-3)
    return Bilevel(network, arch, strategy, params, alphas)


@pytest.fixture
def problem():
    torch.manual_seed(1)
    network = nn.SearchNetwork(SPACE, 2, 4, 3).double()
    arch = nn.ArchParameters(SPACE, scale=1.0).double()
    batches = [
        (torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 3])) for _ in "ab"
    ]
    return network, arch, *batches


def test_steps_follow_the_eager_search(problem):
    """Five steps of the public code and of the fused, pruned step end in the same place."""
    network, arch, train, valid = problem
    eager = reference.SearchNetwork(SPACE, 2, 4, 3).double()
    eager.load_state_dict(network.state_dict())
    eager_arch = nn.ArchParameters(SPACE).double()
    eager_arch.load_state_dict(arch.state_dict())
    ours = build(network, arch, get_strategy("darts"))
    params = torch.optim.SGD(eager.parameters(), 0.1, momentum=0.9, weight_decay=3e-4)
    alphas = torch.optim.Adam(eager_arch.parameters(), 0.01, betas=(0.5, 0.999), weight_decay=1e-3)
    for _ in range(5):
        ours.arch_step(valid, train)
        ours.weight_step(train)
        reference.search_step(eager, eager_arch.alphas(), params, alphas, train, valid)
    for a, b in zip(arch.parameters(), eager_arch.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    for a, b in zip(network.parameters(), eager.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_the_halves_leave_each_others_gradients_alone(problem):
    network, arch, train, valid = problem
    step = build(network, arch, get_strategy("darts"))
    before = {k: v.clone() for k, v in network.state_dict().items() if "running" not in k}
    step.arch_step(valid, train)
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    after = network.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items() if "num_batches" not in k)
    alphas = [a.detach().clone() for a in arch.parameters()]
    for a in arch.parameters():
        a.grad = None
    step.weight_step(train)
    assert all(a.grad is None for a in arch.parameters())
    assert all(torch.equal(a, b) for a, b in zip(alphas, arch.parameters()))


@pytest.mark.parametrize("method", ["darts", "noisy-darts", "fair-darts"])
def test_unrolled_step_leaves_the_network_bit_for_bit(problem, method):
    _, _, train, valid = problem
    strategy = get_strategy(method, order=2)
    space = strategy.space(SPACE)
    network = nn.SearchNetwork(space, 2, 4, 3, noise=strategy.skip_noise()).double()
    arch = nn.ArchParameters(space).double()
    step = build(network, arch, strategy)
    step.weight_step(train)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    alphas = [a.detach().clone() for a in arch.parameters()]
    step.arch_step(valid, train)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not any(torch.equal(a, b) for a, b in zip(alphas, arch.parameters()))


def test_unrolled_gradient_equals_the_eager_networks(problem):
    """The same unrolled step through the eager reference; its formula has tests of its own."""
    network, arch, train, valid = problem
    eager = reference.SearchNetwork(SPACE, 2, 4, 3).double()
    eager.load_state_dict(network.state_dict())
    step = build(network, arch, get_strategy("darts", order=2))
    step.weight_step(train)
    eager.load_state_dict(network.state_dict())
    optimizer = torch.optim.SGD(eager.parameters(), 0.1, momentum=0.9, weight_decay=3e-4)
    optimizer.load_state_dict(step.params_optimizer.state_dict())
    inputs = Inputs(*valid, None), Inputs(*train, None)
    alphas = list(arch.parameters())

    class Eager(ArchStep):
        def _loss(self, given, exact=False):
            weights = {cell: alpha.softmax(-1) for cell, alpha in arch.alphas().items()}
            return F.cross_entropy(eager(given.images, weights), given.labels)

    def half(kind, network, optimizer):
        params = list(network.parameters())
        return kind(step.strategy, network, arch, params, alphas, *inputs, optimizer)

    fused = half(ArchStep, network, step.params_optimizer)
    gradient, _ = step.strategy.arch_gradient(fused)
    expected, _ = step.strategy.arch_gradient(half(Eager, eager, optimizer))
    first, _ = get_strategy("darts").arch_gradient(fused)
    for g, e, f in zip(gradient, expected, first):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-8)
        assert not torch.allclose(g, f)
