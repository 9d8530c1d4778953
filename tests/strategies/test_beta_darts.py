"""beta-DARTS: its regulariser and its schedule by hand, its step against eager."""

import math

import pytest
import torch
from eager_cases import assert_gradients, batches, eager_loss, problem, softmax

from fastnas.nn import ArchParameters
from fastnas.spaces import get_space
from fastnas.strategies import get_strategy


def test_the_weight_grows_by_epoch_from_0():
    """As the code has it for 100 epochs, 50 e / 100; the last epoch has 49.5."""
    strategy = get_strategy("beta-darts")
    found = []
    for epoch in (0, 1, 50, 99):
        strategy.start_epoch(epoch, 100)
        found.append(strategy.figures()["beta_decay"])
    assert found == [0.0, 0.5, 25.0, 49.5]
    strategy = get_strategy("beta-darts", beta_decay_weight=5.0)
    strategy.start_epoch(20, 50)
    assert strategy.figures() == {"beta_decay": 2.0}


@pytest.mark.parametrize("begun", [False, True])
def test_the_regulariser_by_hand(begun):
    """S2 has 28 edges with two candidates; of one logits 0 and log 3, of the others 0 and 0."""
    strategy, arch = get_strategy("beta-darts"), ArchParameters(get_space("S2"), 0.0)
    with torch.no_grad():
        arch.reduce[5, 1] = math.log(3)
    strategy.start_epoch(25, 50)
    if begun:
        strategy.begin(strategy.draw())
    expected = 25 * (math.log(4) + 27 * math.log(2)) / 28
    value = strategy.regulariser(arch)
    assert value.dtype == torch.float32 and float(value.detach()) == pytest.approx(expected)
    # d/d alpha = lambda softmax / edges
    value.backward()
    expected = torch.tensor([25 / 4 / 28, 3 * 25 / 4 / 28])
    torch.testing.assert_close(arch.reduce.grad[5], expected)


@pytest.mark.parametrize("space", ["S1", "nb201"])
def test_the_step_is_eagers(space):
    step, eager = problem("beta-darts", space)
    step.strategy.start_epoch(30, 50)
    valid, train = batches()
    alphas = list(step.arch.parameters())
    rows = torch.cat([a.exp().sum(-1).log() for a in alphas])
    loss = eager_loss(eager, softmax(step.arch), valid) + 30 * rows.sum() / len(rows)
    expected = torch.autograd.grad(loss, alphas)
    found = step.arch_step(valid, train)
    torch.testing.assert_close(found, loss.detach(), rtol=1e-10, atol=0)
    assert_gradients(alphas, expected)
