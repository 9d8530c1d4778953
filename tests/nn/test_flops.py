"""FlopCounterMode finds in a fused network what it finds in the network as its author wrote it."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerated import network
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastnas
from fastnas.ops import relu_conv_bn


def counted(net: nn.Module, backward: bool) -> int:
    x, labels = torch.randn(4, 3, 16, 16).double(), torch.arange(4)
    with FlopCounterMode(display=False) as counter:
        loss: Tensor = nn.functional.cross_entropy(net(x), labels)
        if backward:
            loss.backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("frozen", [False, True], ids=["weights too", "architecture only"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_a_network_counts_as_before(backward: bool, frozen: bool) -> None:
    net = network()
    for p in net.parameters():
        p.requires_grad_(not frozen)
    eager = counted(copy.deepcopy(net), backward)
    assert not fastnas.accelerate(net).left
    assert counted(net, backward) == eager > 10**6


def test_evaluation_counts_too() -> None:
    net = network()
    net(torch.randn(4, 3, 16, 16).double())
    net.eval()
    with torch.no_grad():
        eager = counted(copy.deepcopy(net), False)
        assert not fastnas.accelerate(net).left
        assert counted(net, False) == eager > 10**6


def test_one_op_by_hand() -> None:
    """Two flops for a product and its sum, 6 -> 8 channels over 3 x 5 x 5 pixels."""
    x, p = torch.randn(3, 6, 5, 5), torch.randn(8, 6, 1, 1, requires_grad=True)
    once = 2 * 3 * 5 * 5 * 6 * 8
    with FlopCounterMode(display=False) as counter:
        y = relu_conv_bn(x, [p])
    assert counter.get_total_flops() == once
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == once  # of the weights alone: x needs no gradient
    with FlopCounterMode(display=False) as counter:
        relu_conv_bn(x.requires_grad_(), [p]).sum().backward()
    assert counter.get_total_flops() == 3 * once
