"""What memory_report says a network will hold is what autograd then holds."""

import pytest
import torch
import torch.nn.functional as F

from fastnas import nn
from fastnas.backends import MEMORY
from fastnas.reference import SkipNoise
from fastnas.saved_bytes import saved_bytes
from fastnas.spaces import get_space


def held(network, images, weights):
    """Bytes saved by one training forward, without parameters, buffers and images."""

    def step():
        F.cross_entropy(network(images, weights), torch.zeros(len(images), dtype=torch.long))

    inputs = [*network.parameters(), *network.buffers(), images, *weights.values()]
    return saved_bytes(step, exclude=inputs)


def weights_of(space):
    alphas = nn.ArchParameters(space, scale=1.0).alphas()
    return {cell: alpha.detach().softmax(-1) for cell, alpha in alphas.items()}


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize(
    ("C", "layers", "batch", "size", "noise"),
    [(4, 3, 8, (16, 16), None), (16, 5, 4, (32, 32), SkipNoise()), (6, 1, 3, (9, 14), None)],
)
def test_report_is_met(memory, C, layers, batch, size, noise):
    space = get_space("S0")
    torch.manual_seed(0)
    network = nn.SearchNetwork(space, C, 10, layers, noise=noise, memory=memory)
    told = network.memory_report(batch, size).saved[memory]
    found = held(network, torch.randn(batch, 3, *size), weights_of(space))
    assert found == pytest.approx(told, rel=0.05)


def test_settings_are_told_apart_and_printed():
    network = nn.SearchNetwork(get_space("S0"), 16, 10, 8)
    report = network.memory_report(64, 32)
    assert report.saved["fast"] > 1.5 * report.saved["lean"] > 4 * report.saved["minimal"]
    assert "lean" in str(report) and "batch 64, images 32x32" in str(report)


def test_a_dtype_of_half_the_bytes_holds_half():
    network = nn.SearchNetwork(get_space("S0"), 8, 10, 2)
    full = network.memory_report(16, 16).saved["lean"]
    half = network.bfloat16().memory_report(16, 16).saved["lean"]
    assert half == pytest.approx(full / 2, rel=0.1)


def test_wrong_settings_are_named():
    space = get_space("S0")
    with pytest.raises(ValueError, match="memory is 'small'; allowed: fast, lean, minimal"):
        nn.SearchNetwork(space, 4, 10, 1, memory="small")
    noisy = nn.SearchNetwork(get_space("S4"), 4, 10, 1)
    with pytest.raises(ValueError, match="cell 0 does not run on the fused ops"):
        noisy.memory_report(2, 8)
