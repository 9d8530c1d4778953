"""Pools without a batch norm, which are computed as pools whose batch norm changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerated import C, Mixed
from accelerated import calls as calls
from compared import MODES, assert_same_state, state_after
from public_darts import DilConv, FactorizedReduce, Identity, SepConv

import fastnas
from fastnas.benchmarks.layouts.operations import bare_pool

KINDS = ("max_pool_3x3", "avg_pool_3x3")


class Apart(Mixed):
    """Looks at the output of its first candidate before it is part of a sum."""

    def forward(self, x):
        first, *rest = self.candidates
        return first(x).tanh() + sum(op(x) for op in rest)


def pair(*candidates, kind=Mixed):
    torch.manual_seed(3)
    eager = kind(*candidates).double()
    fused = copy.deepcopy(eager)
    return eager, fused, fastnas.accelerate(fused)


def images():
    # Rounded, so that windows have several largest values.
    x = torch.randn(3, C, 10, 8, generator=torch.Generator().manual_seed(2))
    return (2 * x.double()).round()


@pytest.mark.parametrize("mode", ["training", *MODES[1:]])
@pytest.mark.parametrize("stride", [1, 2])
def test_beside_convolutions(calls, stride, mode):
    skip = Identity() if stride == 1 else FactorizedReduce(C, C)
    pools = [bare_pool(kind, stride) for kind in KINDS]
    eager, fused, report = pair(*pools, DilConv(C, 3, stride), skip, SepConv(C, 3, stride))
    calls.clear()
    given = state_after(fused, fused, (), images(), mode)
    # In evaluation all statistics are constants, and one call computes all.
    assert calls == {"deferred": 2 if mode == "training" else 1} and report.calls.share == 1
    assert_same_state(given, state_after(eager, eager, (), images(), mode))


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_that_is_looked_at(calls, kind):
    eager, fused, report = pair(bare_pool(kind, 2), DilConv(C, 3, 2), kind=Apart)
    calls.clear()
    given = state_after(fused, fused, (), images())
    assert calls == {"deferred": 2} and report.calls.share == 1
    assert_same_state(given, state_after(eager, eager, (), images()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_values_are_not_rounded(dtype, autocast):
    """Nor does autocast narrow what no convolution computes."""
    eager, fused, _ = pair(bare_pool("max_pool_3x3", 1), SepConv(C, 3, 1))
    x = images().to(dtype) / 3
    x[0, 0, 0, 0], x[0, 1, 3, 3] = float("nan"), float("inf")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, expected = (network.candidates[0](x) for network in (fused, eager))
        assert y.dtype == dtype
    torch.testing.assert_close(y + 0, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_one_value_per_channel(kind):
    _, fused, report = pair(bare_pool(kind, 1), DilConv(C, 3, 1))
    x = images()[:1, :, :1, :1]
    assert torch.equal(fused.candidates[0](x) + 0, x)
    assert report.calls.own.total() == 0
