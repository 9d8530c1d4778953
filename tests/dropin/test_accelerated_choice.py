"""Candidates of DARTS in a Choice run fused once `accelerate` has seen the network."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerated import calls  # noqa: F401 - a fixture
from mixture_cases import MEMORIES, assert_same
from torch import nn
from torch.nn import functional as F

import fastnas
from fastnas.layers.primitives import search_candidate
from fastnas.nn import Choice, split_parameters
from fastnas.reference import SkipNoise

DARTS = ("none", "skip_connect", "sep_conv_3x3", "dil_conv_5x5", "max_pool_3x3")


class Attention(nn.Module):
    """A candidate that fastnas does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return x * self.conv(F.adaptive_avg_pool2d(x, 1)).sigmoid()


def network(memory: str, others: bool, **options) -> nn.Module:
    torch.manual_seed(0)

    def choice() -> Choice:
        ops = {name: search_candidate(name, 8, 1) for name in DARTS}
        if others:
            ops |= {"attention": Attention(), "tanh": nn.Tanh()}
        return Choice(ops, mixing="softmax", memory=memory, **options)

    return nn.Sequential(nn.Conv2d(3, 8, 1), choice(), choice(), nn.Flatten(), nn.LazyLinear(2))


def results(model: nn.Module) -> dict[str, torch.Tensor | None]:
    torch.manual_seed(3)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    y = model(x)
    y.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **gradients, **dict(model.named_buffers())}


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("memory", MEMORIES)
def test_darts_candidates_run_fused(memory: str, others: bool, calls) -> None:  # noqa: F811
    own = network(memory, others)
    own(torch.randn(1, 3, 8, 8))
    own.double()
    fused = copy.deepcopy(own)
    for module in own:
        if isinstance(module, Choice):
            module.memory = "eager"
    report = fastnas.accelerate(fused)
    assert len(report.replaced) == 2, report
    calls.clear()
    for _ in range(3):  # a plan, if there is one, takes the place of the forward from the second on
        own.zero_grad(), fused.zero_grad()
        assert_same(results(fused), results(own), 1e-9)
    # Of five candidates in each of two choices. One call of `mixed_edges` computes both choices,
    # or one each where a module of its own reads what is between them.
    assert report.calls.fused.total() == 3 * 2 * 5 and not report.calls.own, report
    assert calls["deferred"] == 3 * (2 if others else 1)


def test_noise_on_a_skip_that_would_wait() -> None:
    own = network("recompute", True, noise={"skip_connect": SkipNoise()})
    own(torch.randn(1, 3, 8, 8))
    own.double()
    fused = copy.deepcopy(own)
    fastnas.accelerate(fused)
    assert_same(results(fused), results(own), 1e-9)


def test_its_logits_are_found_in_an_accelerated_network() -> None:
    model = network("lean", True)
    model(torch.randn(1, 3, 8, 8))
    fastnas.accelerate(model)
    assert [len(p) for p in split_parameters(model)[1]] == [7, 7]
