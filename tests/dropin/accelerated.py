"""Small public-layout networks, and what is compared of them: for the tests of accelerate."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from public_darts import Cell, Network
from torch import nn

from fastnas.dropin import forwards, pending
from fastnas.nn import final_norms

C = 4
EDGES = 5  # of a cell of two nodes


@pytest.fixture
def calls(monkeypatch):
    """How often each fused op was called; `calls.clear()` forgets the check of `accelerate`."""
    counts = Counter()

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for name in ("run_cell", "mixed_sum"):
        monkeypatch.setattr(forwards, name, counted(name, getattr(forwards, name)))
    # Sums of candidates that waited until they were used.
    monkeypatch.setattr(pending, "mixed_edges", counted("deferred", pending.mixed_edges))
    counted_sum = counted("mixed_norm_sum", final_norms.mixed_norm_sum)
    monkeypatch.setattr(final_norms, "mixed_norm_sum", counted_sum)
    return counts


def network(layers=3, **options):
    torch.manual_seed(5)
    net = Network(C, 10, layers, nn.CrossEntropyLoss(), steps=2, multiplier=2, **options).double()
    for alpha in net.arch_parameters():
        alpha.data = torch.randn_like(alpha, dtype=torch.float64)
    return net


class Mixed(nn.Module):
    """A mixed op with weights of its own."""

    def __init__(self, *candidates):
        super().__init__()
        self.candidates = nn.ModuleList(candidates)
        self.w = nn.Parameter(torch.randn(len(candidates)))

    def forward(self, x):
        return sum(w * op(x) for w, op in zip(self.w, self.candidates))


def cell(reduction=False, reduction_prev=False, **options):
    return Cell(2, 2, 6, 8, C, reduction, reduction_prev, **options).double()


def cell_inputs(reduction_prev=False, candidates=8, size=8):
    s0 = torch.randn(3, 6, size * (2 if reduction_prev else 1), size * (2 if reduction_prev else 1))
    s1 = torch.randn(3, 8, size, size)
    w = torch.randn(EDGES, candidates).softmax(-1)
    return [t.double().requires_grad_() for t in (s0, s1, w)]


def edge_inputs(candidates=8):
    x, w = torch.randn(3, C, 8, 8), torch.randn(candidates).softmax(-1)
    return [t.double().requires_grad_() for t in (x, w)]


def observed(module, inputs, extra=(), seed=9):
    """Output, gradients of inputs and parameters, buffers, after one call with a seed."""
    torch.manual_seed(seed)
    y = module(*inputs)
    leaves = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    leaves += [*extra, *(p for p in module.parameters() if p.requires_grad)]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    grads = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    zeros = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads)]
    return [y.detach(), *zeros, *(b.clone() for b in module.buffers())]


def assert_same(given, expected, tolerance=1e-10):
    assert len(given) == len(expected)
    for a, b in zip(given, expected):
        scale = 1 + float(b.detach().abs().max()) if b.numel() else 1
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


def assert_same_state(a, b, tolerance=1e-10):
    assert list(a.state_dict()) == list(b.state_dict())
    assert_same(list(a.state_dict().values()), list(b.state_dict().values()), tolerance)
