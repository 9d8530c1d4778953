"""Outputs of candidates in a stack: weighed and summed they are one call, else they are a stack."""

from __future__ import annotations

import pytest
import torch
from accelerated import calls  # noqa: F401
from test_deferred import assert_alike, pair


def stacked(ops, x, dim=0):
    return torch.stack([op(x) for op in ops], dim=dim)


def column(w):
    return w.view(-1, 1, 1, 1, 1)


TOGETHER = {
    "einsum": lambda ops, x, w: torch.einsum("k,k...->...", w, stacked(ops, x)),
    "einsum by letters": lambda ops, x, w: torch.einsum("i, ibchw -> bchw", w, stacked(ops, x)),
    "a product": lambda ops, x, w: (column(w) * stacked(ops, x)).sum(0),
    "from the right": lambda ops, x, w: torch.sum(stacked(ops, x) * column(w), dim=0),
    "twice": lambda ops, x, w: (column(w) * (column(w) * stacked(ops, x))).sum(dim=0),
    "alone": lambda ops, x, w: stacked(ops, x).sum(0),
    "a loop": lambda ops, x, w: sum(a * y for a, y in zip(w, stacked(ops, x))),
    "items": lambda ops, x, w: (y := stacked(ops, x))[1] * w[0] + y[-1] + y[0],
    "its size": lambda ops, x, w: (y := stacked(ops, x)).sum(0) * (y.shape[0] + y.dim() + len(y)),
}
APART = {
    "a mean": lambda ops, x, w: stacked(ops, x).mean(0),
    "another dimension": lambda ops, x, w: stacked(ops, x, 1).sum(1),
    "another sum": lambda ops, x, w: (column(w) * stacked(ops, x)).sum((0, 2)),
    "kept": lambda ops, x, w: stacked(ops, x).sum(0, keepdim=True)[0],
    "other weights": lambda ops, x, w: (stacked(ops, x) * w[:1]).sum(0),
    "another einsum": lambda ops, x, w: torch.einsum("k,kbchw->bhwc", w, stacked(ops, x)),
    "in place": lambda ops, x, w: in_place(stacked(ops, x), w),
    "with a tensor": lambda ops, x, w: torch.stack([ops[0](x), x * w[0]]).sum(0),
}


def in_place(y, w):
    y.mul_(column(w))
    return y.sum(0) + y[0]


@pytest.mark.parametrize("name", TOGETHER)
def test_one_call_computes_all(calls, name):  # noqa: F811
    eager, fused = pair(TOGETHER[name])
    for _ in range(2):
        calls.clear()
        assert_alike(eager, fused)
        assert calls["deferred"] == 1


@pytest.mark.parametrize("name", APART)
def test_anything_else_is_as_of_a_tensor(name):
    assert_alike(*pair(APART[name]))
