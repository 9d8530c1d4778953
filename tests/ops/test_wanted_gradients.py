"""Backward computes the gradients that the running pass asks for, and no others."""

from __future__ import annotations

import pytest
import torch

from fastnas.ops import call, mixed_edges
from fastnas.spaces import Edge, EdgeTable
from fastnas.spaces.edge_table import edge_term

C = 4
TABLE = EdgeTable(
    1, 1, 2, (Edge(0, 0, 1, (edge_term("sep_conv_3x3", 0, 1), edge_term("skip_connect", 1, 1))),)
)


@pytest.fixture
def asked(monkeypatch):
    """Of each pass the gradients of w, x and the parameters that were computed."""
    found = []

    def recorded(needs, leaves):
        found.append(wanted(needs, leaves))
        return found[-1]

    wanted = call.wanted
    monkeypatch.setattr(call, "wanted", recorded)
    return found


def inputs():
    torch.manual_seed(3)
    x, w = torch.randn(2, C, 6, 6).double(), torch.randn(1, 2).double()
    params = [torch.randn(shape).double() for shape in TABLE.param_shapes(C)]
    return [t.requires_grad_() for t in (w, x, *params)]


def output(w, x, *params):
    return mixed_edges([x], w, list(params), TABLE).square().sum()


def test_only_what_is_asked_for_is_computed(asked):
    leaves = inputs()
    y = output(*leaves)
    y.backward(retain_graph=True)
    expected = [t.grad for t in leaves]
    for some in ([0], [1], [0, 1], [2, 5], [5], [0, 3]):
        found = torch.autograd.grad(y, [leaves[i] for i in some], retain_graph=True)
        for i, grad in zip(some, found):
            torch.testing.assert_close(grad, expected[i], rtol=0, atol=0)
    # One that is asked for speaks for those before it.
    assert [sum(computed) for computed in asked] == [6, 1, 2, 2, 6, 6, 4]
    assert all(sorted(computed, reverse=True) == computed for computed in asked)


def test_leaves_behind_other_operations(asked):
    w, x, *params = inputs()
    scaled = [2 * p for p in params]
    y = output(w, x, *scaled)
    (grad,) = torch.autograd.grad(y, params[:1], retain_graph=True)
    y.backward()
    torch.testing.assert_close(grad, params[0].grad, rtol=0, atol=0)


def test_gradients_with_a_graph_of_their_own():
    leaves = inputs()
    (first,) = torch.autograd.grad(output(*leaves), leaves[:1], create_graph=True)
    first.sum().backward()
    assert all(t.grad is not None for t in leaves)
