"""DrNAS: its draws, their derivative and its anchor by hand, its step against eager."""

import math

import pytest
import torch
from eager_cases import assert_gradients, batches, eager_loss, problem
from torch.distributions import Dirichlet
from torch.nn import functional as F

from fastnas.nn import ArchParameters
from fastnas.ops import draw_rng
from fastnas.search.config import SearchConfig, make_config
from fastnas.spaces import get_space
from fastnas.strategies import get_strategy
from fastnas.strategies.drnas import concentration, dirichlet


def test_the_concentration_is_elu_and_one():
    alpha = torch.tensor([-40.0, -1.0, 0.0, 1e-3, 2.0], requires_grad=True)
    c = concentration(alpha)
    torch.testing.assert_close(c[1:], F.elu(alpha[1:]) + 1)
    assert c[0].item() == pytest.approx(math.exp(-40), rel=1e-6, abs=0)  # where the sum is 0
    (slope,) = torch.autograd.grad(c.sum(), alpha)
    torch.testing.assert_close(slope, torch.tensor([math.exp(-40), math.exp(-1), 1, 1, 1]))


def test_the_pathwise_derivative_is_that_of_the_mean():
    """E w_k = c_k / s, so that d E w_0 / d c_0 = (s - c_0) / s^2, d E w_0 / d c_1 = -c_0 / s^2."""
    c = torch.tensor([2.0, 0.5, 1.5], dtype=torch.float64).repeat(40_000, 1).requires_grad_()
    w = dirichlet(c, torch.Generator().manual_seed(0))
    torch.testing.assert_close(w.sum(-1), torch.ones(len(w), dtype=w.dtype))
    assert w.mean(0).tolist() == pytest.approx([0.5, 0.125, 0.375], abs=5e-3)
    (slope,) = torch.autograd.grad(w[:, 0].sum(), c)
    expected = [(4 - 2) / 16, -2 / 16, -2 / 16]
    assert slope.mean(0).tolist() == pytest.approx(expected, abs=3e-3)


def eager_draw(arch, seed):
    torch.manual_seed(seed)
    return {cell: Dirichlet(F.elu(alpha) + 1).rsample() for cell, alpha in arch.alphas().items()}


@pytest.mark.parametrize("space", ["S1", "S3", "nb201"])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_the_step_is_eagers(space, kl):
    step, eager = problem("drnas", space, kl_weight=kl)
    valid, train = batches()
    alphas = list(step.arch.parameters())
    torch.manual_seed(9)
    seeds = [int(draw_rng()[0, 0]) for _ in range(3)]
    loss = eager_loss(eager, eager_draw(step.arch, seeds[0]), valid)
    for alpha in alphas if kl else ():
        c = F.elu(alpha) + 1
        s = c.sum(-1)
        apart = (c - 1) * (torch.digamma(c) - torch.digamma(s)[:, None]) - torch.lgamma(c)
        loss = loss + kl * (apart.sum(-1) + torch.lgamma(s) - math.lgamma(c.shape[1])).sum()
    expected = torch.autograd.grad(loss, alphas)
    torch.manual_seed(9)
    found = step.arch_step(valid, train)
    torch.testing.assert_close(found, loss.detach(), rtol=1e-10, atol=0)
    assert_gradients(alphas, expected)
    after = torch.get_rng_state()
    # The third seed is that of the weight step, after those of the batches of the other half.
    loss = eager_loss(eager, eager_draw(step.arch, seeds[2]), train)
    loss.backward()
    torch.set_rng_state(after)
    found, _ = step.weight_step(train)
    torch.testing.assert_close(found, loss.detach(), rtol=1e-10, atol=0)
    assert_gradients(step.params, [p.grad for p in eager.parameters()])


def test_a_half_of_a_step_has_one_draw():
    """So that a finite difference sees the weights alone; the next half has another."""
    strategy, arch = get_strategy("drnas"), ArchParameters(get_space("S2"))
    strategy.begin(strategy.draw())
    first, again = (strategy.forward_weights(arch) for _ in "ab")
    strategy.begin(strategy.draw())
    other = strategy.forward_weights(arch)
    for cell in first:
        assert torch.equal(first[cell], again[cell]) and not torch.equal(first[cell], other[cell])


def test_the_genotype_is_that_of_the_mean():
    """c is (4, 1, ..., 1) on edge 2, (3, 1/e, ..., 1/e) on edge 3: 4/10 < 3/(3 + 6/e) = .58."""
    strategy = get_strategy("drnas")
    space = strategy.space(get_space("S0"))
    assert space.num_candidates("normal") == 7
    arch = ArchParameters(space, 0.0)
    with torch.no_grad():
        arch.normal[2, 3] = 3.0
        arch.normal[3] = -1.0
        arch.normal[3, 4] = 2.0
    weights = strategy.mixing_weights(arch)["normal"]
    assert weights[2, 3].item() == pytest.approx(0.4)
    assert weights[3, 4].item() == pytest.approx(3 / (3 + 6 / math.e))
    assert torch.equal(strategy.validation_weights(arch)["normal"], weights)
    genotype = strategy.derive(arch, space)
    assert genotype.normal[1] == (("sep_conv_5x5", 1), ("sep_conv_3x3", 0))


def test_its_published_settings():
    found = {}
    for space in ("S0", "nb201"):
        settings = make_config(SearchConfig, {"method": "drnas", "space": space})
        names = ("epochs", "lr", "lr_min", "arch_lr", "batch_size")
        found[space] = [settings.resolved(name) for name in names]
    assert found == {"S0": [50, 0.1, 0.0, 6e-4, 64], "nb201": [100, 0.025, 0.001, 3e-4, 64]}
