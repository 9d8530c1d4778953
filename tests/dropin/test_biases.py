"""Biases before batch norms, which the kernels do not add: values, statistics and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerated import C
from accelerated import calls as calls
from compared import MODES, assert_same_state, state_after
from torch import nn

import fastnas
from fastnas.benchmarks.layouts.nb201_operations import operation

NAMES = {
    1: ("dua_sepc_3x3", "dil_sepc_5x5", "nor_conv_3x3", "nor_conv_1x1", "skip_connect"),
    2: ("dua_sepc_5x5", "dil_sepc_3x3", "skip_connect", "max_pool_3x3"),
}


class Mixed(nn.Module):
    def __init__(self, candidates):
        super().__init__()
        self.candidates = nn.ModuleList(candidates)
        self.w = nn.Parameter(torch.randn(len(candidates)))

    def forward(self, x):
        return sum(w * op(x) for w, op in zip(self.w, self.candidates))


def pair(stride, *names, depthwise=False):
    torch.manual_seed(3)
    eager = Mixed([operation(name, C, stride, bias=True) for name in names])
    for module in eager.modules():
        if depthwise and isinstance(module, nn.Conv2d) and module.groups > 1:
            module.bias = nn.Parameter(torch.randn(C))
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean), nn.init.uniform_(module.running_var, 0.5, 2)
    eager.double()
    fused = copy.deepcopy(eager)
    return eager, fused, fastnas.accelerate(fused, check=False)


def images():
    return torch.randn(3, C, 8, 8, generator=torch.Generator().manual_seed(2)).double()


def assert_alike(eager, fused, mode):
    given, expected = (state_after(n, n, (), images(), mode) for n in (fused, eager))
    assert_same_state(given, expected)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("stride", NAMES)
def test_every_mode(stride, depthwise):
    eager, fused, report = pair(stride, *NAMES[stride], depthwise=depthwise)
    for mode in ("training", *MODES, "training"):
        assert_alike(eager, fused, mode)
    assert report.calls.share == 1


@pytest.mark.parametrize("frozen", ["bias", "weight"])
def test_frozen_ones(frozen):
    """The weight of a pointwise convolution scales the bias of a depthwise one, frozen or not."""
    eager, fused, _ = pair(1, "dua_sepc_3x3", "dil_sepc_3x3", "nor_conv_3x3", depthwise=True)
    for network in (eager, fused):
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(not name.endswith(frozen))
    assert_alike(eager, fused, "evaluation with gradients")


def test_first_halves_alone_are_computed_by_themselves(calls):
    _, fused, _ = pair(1, "dua_sepc_3x3", "dil_sepc_3x3", "dua_sepc_5x5", "skip_connect")
    for mode, ops in (("training", 1), ("evaluation", 1), ("evaluation with gradients", 3)):
        calls.clear()
        state_after(fused, fused, (), images(), mode)
        assert calls == {"deferred": ops}


@pytest.mark.parametrize("names", [("dua_sepc_3x3", "dil_sepc_3x3"), ("nor_conv_3x3",) * 2])
def test_second_derivatives(names):
    eager, fused, _ = pair(1, *names)
    found = []
    for network in (fused.eval(), eager.eval()):
        x = images().requires_grad_()
        leaves = [x, *network.parameters()]
        y = network(x).square().mean()
        grads = torch.autograd.grad(y, leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    for given, expected in zip(*found):
        torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-11)


def test_a_bias_that_is_changed_before_the_output_is_used():
    _, fused, _ = pair(1, "dil_sepc_3x3", "dua_sepc_3x3")
    with torch.no_grad():
        y = fused.candidates[0](images())
        fused.candidates[0].op[2].bias.add_(1)
    with pytest.raises(RuntimeError, match="a parameter of dil_conv_3x3 was changed"):
        y.sum()
