"""The layouts of public code bases themselves: they run, learn, and are what they say."""

from __future__ import annotations

import pickle
from functools import partial

import pytest
import torch
from compared import state_after
from torch import nn

from fastnas.benchmarks.layouts import LAYOUTS
from fastnas.benchmarks.layouts.counting import calls_of

UNUSED = {
    "drnas-pruned": "candidates that were pruned",
    "darts-pt-projection": "candidates that were not chosen",
    "dots-topology": "candidates that were not kept",
    "sgas-decided": "candidates and edges that were not selected",
    "xautodl-nasnet-gdas": "candidates that were not drawn",
}
"""The layouts some of whose parameters a step leaves without a gradient."""


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_reaches_what_it_should(name):
    layout = LAYOUTS[name]
    network = layout.build(4, 3, 2).double()
    for alphas in layout.alphas(network):
        alphas.data = torch.randn_like(alphas, dtype=torch.float64)
    candidates = list(layout.candidates(network))
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    seen = {}

    def step():
        call = partial(layout.call, network)
        seen.update(state_after(call, network, layout.alphas(network), x))

    calls = calls_of(candidates, step)
    assert len(candidates) == len(set(candidates))
    assert (0 < calls < len(candidates)) == (name in UNUSED)
    assert seen["output"].shape == (3, 10)
    assert all(value is None or value.isfinite().all() for value in seen.values())
    without = [key for key, value in seen.items() if value is None]
    assert bool(without) == (name in UNUSED)
    assert seen["gradient of x"].any()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_network_can_be_pickled(name):
    network = LAYOUTS[name].build(4, 3, 2)
    again = pickle.loads(pickle.dumps(network))
    assert list(again.state_dict()) == list(network.state_dict())


def test_calls_are_counted_and_the_counting_leaves_no_trace():
    first, second = nn.Identity(), nn.Identity()
    assert calls_of([first, second, first], lambda: first(second(first(1)))) == 3
    assert not first._forward_hooks and not second._forward_hooks
