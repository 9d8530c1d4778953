"""What a network does to outputs that wait, and between a call and its use, is as in eager."""

from __future__ import annotations

import pytest
import torch
from accelerated import C, assert_same, assert_same_state, edge_inputs
from test_deferred import assert_alike, pair
from test_nodes_that_wait import cell, frozen, shuffle
from torch.utils.checkpoint import checkpoint


def without_gradient(h, x):
    with torch.no_grad():
        h.mul_(2)
    return h


def through_alias(h, x):
    alias = h.view_as(h)
    h.relu_()
    return alias


def named(h, x):
    copy_of = sum([h])
    copy_of.data.mul_(2)
    copy_of[:, :1] += 1
    return h


def asked(h, x):
    part = h[:, 1:3]
    assert h.requires_grad
    return torch.cat([part, part], 1) + h


def given_data(h, x):
    h.data = h.data * 2
    return h


def cast(h, x):
    with torch.no_grad():
        h.add_(x.float())
    assert h.dtype == x.dtype
    return h


def scaled_channel(h, x):
    h[:, :1] *= 2
    h.detach()[:, 1].mul_(3)
    return h


USES = (without_gradient, through_alias, named, asked, given_data, cast, scaled_channel)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("candidate", [0, 2])
def test_what_others_do_to_an_output(use, candidate):
    """Of a candidate that computes, and of an identity, which is its input itself."""

    def body(ops, x, w):
        h = ops[candidate](1 * x)
        return w[0] * use(h, x) + w[1] * h

    x, w = edge_inputs(3)
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert_alike(*pair(body), [x, w])


def test_a_change_that_does_not_fit_is_refused():
    def body(ops, x, w):
        return ops[0](x).add_(torch.ones(2, *x.shape).to(x))

    for module in pair(body):
        with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
            module(*edge_inputs(3))


def test_gradients_of_a_node_are_refused_where_parts_of_it_were_read():
    def body(ops, x, w):
        h = w[0] * ops[0](x)
        y = ops[1](torch.cat([h[:, :2], h[:, 2:]], 1))
        h.retain_grad()
        return y

    with pytest.raises(RuntimeError, match="is part of a sum already"):
        pair(body)[1](*edge_inputs(3))


@pytest.mark.parametrize("whole", [True, False])
def test_a_checkpoint_around_a_candidate_or_a_cell_runs_twice(whole):
    """Statistics move at each run, and what is computed in between is not kept."""

    def body(ops, x, w):
        parts = [lambda h: cell(ops, h, w)] if whole else list(ops)
        return sum(checkpoint(part, x, use_reentrant=False) for part in parts)

    eager, fused = pair(body)
    inputs = edge_inputs(3)
    for module in (eager, fused):
        module(*inputs).square().sum().backward()
    assert_same([p.grad for p in fused.parameters()], [p.grad for p in eager.parameters()])
    assert_same_state(fused, eager)


def test_a_chain_of_nodes_is_no_recursion():
    def body(ops, x, w):
        for _ in range(300):
            x = 0.5 * ops[0](x) + ops[2](x)
        return x

    eager, fused = pair(body)
    inputs = [t.detach() for t in edge_inputs(3)]
    with torch.no_grad():
        assert_same([fused(*inputs)], [eager(*inputs)], 1e-8)


def test_a_sum_in_evaluation_waits_for_no_statistics_that_move():
    def body(ops, x, w):
        y = frozen(ops[0], x)
        z = ops[0](x).sum()
        return y * z

    eager, fused = pair(body)
    inputs = [t.detach() for t in edge_inputs(3)]
    with torch.no_grad():
        assert_same([fused(*inputs)], [eager(*inputs)])


def test_an_input_that_is_cut_off_before_the_sum_is_used():
    def body(ops, x, w):
        h = 1 * x
        y = ops[0](h)
        h.detach_()
        return y.sum()

    with pytest.raises(RuntimeError, match="was changed before the sum"):
        pair(body)[1](*edge_inputs(3))


def test_layouts_that_meet_in_a_sum():
    def body(ops, x, w):
        y = ops[0](x)
        assert (x.contiguous() + y).is_contiguous() and not (y + x.contiguous()).is_contiguous()
        return ops[1](shuffle(torch.cat([y, x], 1))[:, :C]) + x

    eager, fused = pair(body)
    x, w = edge_inputs(3)
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert_alike(eager, fused, [x, w])
    assert fused(x, w).stride() == eager(x, w).stride()
