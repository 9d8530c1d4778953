"""A search that has not searched is told from one that has."""

import math

import pytest
import torch

from fastnas.nn import ArchParameters
from fastnas.spaces import get_space
from fastnas.strategies import STRATEGIES, get_strategy
from fastnas.strategies.margins import noise_margin, operation_margins


def begun(method, layout):
    strategy = get_strategy(method)
    if layout == "nb201" and (strategy.topology != "none" or strategy.chooses_edges):
        pytest.skip("the method does not search NAS-Bench-201")
    space = strategy.space(get_space(layout))
    arch = ArchParameters(space, strategy.alpha_scale, strategy.topology, strategy.tied)
    return strategy, arch, space


@pytest.mark.parametrize("layout", ["S0", "nb201"])
@pytest.mark.parametrize("method", STRATEGIES)
def test_initial_logits_are_undecided_and_searched_ones_are_not(method, layout):
    strategy, arch, space = begun(method, layout)
    for found in strategy.undecided(arch, space).values():
        assert found.count >= 0.8 * found.of > 0
    for logits in arch.alphas().values():
        steps = torch.randperm(logits.numel()).view_as(logits).float()
        for alpha in arch.parameters():
            if alpha.shape[-1] == logits.shape[-1]:
                alpha.data.copy_(0.02 * steps[: len(alpha)])
    assert all(found.count == 0 for found in strategy.undecided(arch, space).values())


def test_the_criterion():
    assert noise_margin(1e-3) == pytest.approx(3 * math.sqrt(2) * 1e-3) and noise_margin(0) == 0
    space = get_space("S0")
    logits = torch.zeros(14, 8)
    logits[:, 0], logits[:, 3], logits[:, 5] = 9.0, 2.0, 1.5
    assert operation_margins(logits, space, "normal", True) == [0.5] * 14
    assert operation_margins(logits, space, "normal", False) == [7.0] * 14
