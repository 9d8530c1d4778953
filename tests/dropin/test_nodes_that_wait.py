"""Sums that candidates of other sums read, concatenations and parts of them: what waits, and what
it is when it does not.
"""

from __future__ import annotations

import copy

import pytest
import torch
from accelerated import C, assert_same, assert_same_state, edge_inputs, observed
from accelerated import calls as calls
from public_darts import DilConv, Identity, SepConv
from test_deferred import Choice, assert_alike, pair
from torch import nn

import fastnas
from fastnas.benchmarks.layouts import LAYOUTS


def shuffle(y, groups=2):
    N, channels, H, W = y.data.size()
    y = y.view(N, groups, channels // groups, H, W)
    return torch.transpose(y, 1, 2).contiguous().view(N, -1, H, W)


def chain(ops, x, w):
    """Three nodes, each of all before it, as in a cell."""
    states, ops = [x], iter(ops)
    for _ in range(3):
        states.append(sum(w[j] * next(ops)(state) for j, state in enumerate(states)))
    return states[-1]


def six():
    """A candidate for each edge of three nodes."""
    return [
        SepConv(C, 3, 1),
        DilConv(C, 3, 1),
        Identity(),
        Identity(),
        SepConv(C, 5, 1),
        Identity(),
    ]


def cell(ops, x, w):
    first = w[0] * ops[0](x) + ops[2](x)
    second = w[1] * ops[1](first) + ops[2](first)
    return torch.cat([first, second], dim=1)


def partial(ops, x, w):
    """An edge that mixes its first half of channels, into a node of two edges."""

    def edge(e, h, beta):
        mixed = w[0] * ops[e](h[:, :C]) + w[1] * ops[2](h[:, :C])
        return beta * shuffle(torch.cat([mixed, h[:, C:]], dim=1))

    first, second = torch.cat([x, x], 1), torch.cat([x.sin(), x], 1)
    h = edge(0, first, w[2]) + edge(1, second, w[0])
    return edge(4, h, w[1]) + 2 * edge(5, h, w[0])


BODIES = {
    "a node of nodes": (chain, 1),
    "a cell": (cell, 1),
    "partial channels": (partial, 2),
    "scaled cell": (lambda ops, x, w: w[2] * cell(ops, x, w), 1),
    "a node that is used as well": (
        lambda ops, x, w: (h := w[0] * ops[0](x)).sum() * ops[1](h) + h,
        2,
    ),
    "a node that is scaled": (lambda ops, x, w: ops[1](h := w[0] * ops[0](x)) + w[1] * h, 2),
    "a node with a tensor in it": (lambda ops, x, w: ops[1](ops[0](x) + x.cos()), 2),
    "the same call in two nodes": (
        lambda ops, x, w: ops[1](w[0] * (y := ops[0](x)) + x * 0) + w[1] * y,
        3,
    ),
    "a call twice in a node": (
        lambda ops, x, w: ops[1]((y := ops[0](x)) * w[0] + y * w[1]) + x,
        2,
    ),
    "a call twice in a node of nodes": (
        lambda ops, x, w: ops[1]((y := ops[0](x)) * w[0] + y * w[1]) * w[2],
        1,
    ),
    "a sum in evaluation": (lambda ops, x, w: ops[1](frozen(ops[0], x)), 2),
}


def frozen(op, x):
    op.eval()
    y = op(x)
    op.train()
    return 2 * y


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", BODIES)
def test_nodes_are_computed_together(calls, name, layout):
    body, ops = BODIES[name]
    eager, fused = pair(body, *(six() if body in (chain, partial) else ()))
    x, w = edge_inputs(3)
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    calls.clear()
    assert_same(observed(fused, [x, w]), observed(eager, [x, w]))
    assert_same_state(fused, eager)
    assert calls["deferred"] == ops


BETWEEN = {
    "the node in place": lambda h: h.mul_(2),
    "its values": lambda h: h.data.mul_(2),
    "an activation in place": lambda h: nn.functional.relu(h, inplace=True),
}


@pytest.mark.parametrize("change", BETWEEN)
def test_a_node_that_changes_after_a_candidate_read_it(change):
    """What was called before saw the old values, as it does in eager."""

    def body(ops, x, w):
        h = w[0] * ops[0](x)
        y = ops[1](h)
        if "values" in change:
            y = y + 0 * x  # `.data` does not tell autograd
            y.sum()
        BETWEEN[change](h)
        return y + h

    assert_alike(*pair(body))


@pytest.mark.parametrize("change", BETWEEN)
def test_a_part_of_a_node_that_changes(change):
    def body(ops, x, w):
        h = w[0] * ops[0](x) + x
        part = h[:, :C]
        with torch.no_grad():
            BETWEEN[change](h)
            return ops[1](part) + h[:, :C]

    eager, fused = pair(body)
    x, w = (t.detach() for t in edge_inputs(3))
    assert_same([fused(x, w)], [eager(x, w)])


def test_a_part_that_changes_is_part_of_the_node():
    def body(ops, x, w):
        with torch.no_grad():
            h = w[0] * ops[0](x)
            h[:, 1:3].mul_(2)
            part = h[:, :2]
            part += 1
            return ops[1](h) + h

    eager, fused = pair(body)
    x, w = (t.detach() for t in edge_inputs(3))
    assert_same([fused(x, w)], [eager(x, w)])


def test_an_identity_of_a_node_is_the_node():
    def body(ops, x, w):
        h = w[0] * ops[0](x)
        y = ops[2](h)
        h.mul_(3)
        return y + ops[1](h)

    assert_alike(*pair(body))


def test_gradients_of_a_node_are_watched_before_it_is_read():
    def body(ops, x, w):
        h = w[0] * ops[0](x)
        h.register_hook(lambda g: 3 * g)
        part = h[:, 1:]
        part.register_hook(lambda g: 2 * g)
        return ops[1](h) + torch.cat([part, part[:, :1]], 1)

    assert_alike(*pair(body))


def test_gradients_of_a_node_that_was_read_are_refused():
    def body(ops, x, w):
        h = w[0] * ops[0](x)
        y = ops[1](h).sum()
        h.retain_grad()
        return y

    with pytest.raises(RuntimeError, match="is part of a sum already"):
        pair(body)[1](*edge_inputs(3))


def test_gradients_of_a_node_that_waits_are_whole():
    def body(ops, x, w):
        h = w[0] * ops[0](x)
        y = ops[1](h)
        h.register_hook(lambda g: 3 * g)
        return y + h

    assert_alike(*pair(body))


MOVES = {
    "view": lambda y: y.view(3, -1),
    "flatten": lambda y: torch.flatten(y, 1).view(3, 2 * C, 8, 8),
    "permute": lambda y: y.permute(0, 2, 3, 1),
    "rotated": lambda y: y.transpose(2, 3),
    "reshape": lambda y: torch.reshape(y, (3, 2, C, 8, 8)).permute(0, 2, 1, 3, 4).flatten(1, 2),
    "part": lambda y: y[:, 1:, 2:],
    "dtype": lambda y: y.view(torch.int64).view(torch.float64),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_concatenation_in_another_order(name):
    def body(ops, x, w):
        y = MOVES[name](torch.cat([w[0] * ops[0](x), x], dim=1))
        return y * w[1] + y

    eager, fused = pair(body)
    inputs = edge_inputs(3)
    if name == "dtype":  # as integers it has no gradient
        with torch.no_grad():
            assert_same([fused(*inputs)], [eager(*inputs)])
        return
    assert_alike(eager, fused, inputs)
    assert fused(*inputs).stride() == eager(*inputs).stride()


def test_a_view_that_cannot_be_is_an_error_at_once():
    eager, fused = pair(lambda ops, x, w: torch.cat([ops[0](x), x], 1).view(3, 5, -1))
    for module in (eager, fused):
        with pytest.raises(RuntimeError, match="shape"):
            module(*edge_inputs(3))


def test_what_is_concatenated_must_not_change_before():
    def body(ops, x, w):
        t = x.detach().clone()
        y = torch.cat([ops[0](x), t], 1)
        t.add_(1)
        return y.sum()

    with pytest.raises(RuntimeError, match="was changed before the sum"):
        pair(body)[1](*edge_inputs(3))


class Two(nn.Module):
    """Two cells, one behind the other: each is one call."""

    def __init__(self):
        super().__init__()
        self.cells = nn.ModuleList(Choice(chain, *six()) for _ in range(2))

    def forward(self, x, w):
        for one in self.cells:
            x = one(x, w)
        return x


def test_cells_are_calls_of_their_own(calls):
    torch.manual_seed(4)
    eager = Two().double()
    fused = copy.deepcopy(eager)
    fastnas.accelerate(fused)
    inputs = edge_inputs(3)
    calls.clear()
    assert_same(observed(fused, inputs), observed(eager, inputs))
    assert calls["deferred"] == 2


@pytest.mark.parametrize("name", ["pdarts", "naslib", "pt.darts", "confopt", "dots", "nni"])
def test_a_cell_that_returns_all_its_nodes_is_one_call(calls, name):
    layout = LAYOUTS[name]
    network = layout.build(4, 3, 2)
    fastnas.accelerate(network)
    for _ in range(2):
        calls.clear()
        layout.call(network, torch.randn(2, 3, 16, 16)).sum().backward()
        assert calls["deferred"] == 3
