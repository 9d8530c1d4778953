"""accelerate on a user's network: the results of the untouched one."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from accelerated import (
    EDGES,
    C,
    assert_same,
    assert_same_state,
    cell,
    cell_inputs,
    edge_inputs,
    network,
    observed,
)
from accelerated import (
    calls as calls,
)
from public_darts import WITHOUT_NONE, Cell, MixedOp
from torch import nn

from fastnas.dropin.accelerate import accelerate
from fastnas.dropin.say import say_once


@pytest.mark.parametrize("memory", ["fast", "lean", "minimal"])
@pytest.mark.parametrize("primitives", [{}, {"primitives": WITHOUT_NONE}])
def test_network_agrees_with_the_untouched_one(calls, primitives, memory):
    eager = network(**primitives)
    fused = copy.deepcopy(eager)
    report = accelerate(fused, memory)
    assert [name for name, _ in report.replaced] == ["cells.0", "cells.1", "cells.2"]
    assert not report.left
    calls.clear()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    given = observed(fused, [x], fused.arch_parameters())
    assert calls == {"run_cell": 3}
    assert_same(given, observed(eager, [x], eager.arch_parameters()))
    eager.eval(), fused.eval()
    given = observed(fused, [x], fused.arch_parameters())
    assert_same(given, observed(eager, [x], eager.arch_parameters()))
    assert calls == {"run_cell": 6}
    for module in (eager, fused):
        module.train()
        for norm in module.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.eval()
    given = observed(fused, [x], fused.arch_parameters())
    assert_same(given, observed(eager, [x], eager.arch_parameters()))
    assert calls == {"run_cell": 9}
    assert_same_state(fused, eager)


@pytest.mark.parametrize("reduction", [False, True])
@pytest.mark.parametrize("reduction_prev", [False, True])
def test_cell(calls, reduction, reduction_prev):
    eager = cell(reduction, reduction_prev)
    fused = copy.deepcopy(eager)
    assert accelerate(fused).replaced[0][0] == "Cell"
    calls.clear()
    inputs = cell_inputs(reduction_prev)
    assert_same(observed(fused, inputs), observed(eager, inputs))
    assert calls == {"run_cell": 1}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_cell_of_four_nodes_in_either_layout(calls, layout):
    eager = Cell(4, 4, 6, 8, C, True, False).double().to(memory_format=layout)
    fused = copy.deepcopy(eager)
    accelerate(fused)
    calls.clear()
    s0, s1, _ = (t.detach() for t in cell_inputs())
    s0, s1 = (t.contiguous(memory_format=layout).requires_grad_() for t in (s0, s1))
    w = torch.randn(14, 8).double().softmax(-1).requires_grad_()
    assert_same(observed(fused, [s0, s1, w]), observed(eager, [s0, s1, w]))
    assert calls == {"run_cell": 1}


@pytest.mark.parametrize("stride", [1, 2])
def test_mixed_op_for_itself(calls, stride):
    eager = MixedOp(C, stride).double()
    fused = copy.deepcopy(eager)
    accelerate(fused)
    calls.clear()
    inputs = edge_inputs()
    assert_same(observed(fused, inputs), observed(eager, inputs))
    assert calls == {"deferred": 1}


def test_single_precision_is_eagers_to_rounding():
    exact = network()
    x = torch.randn(8, 3, 16, 16)
    expected = observed(exact, [x.double()], exact.arch_parameters())
    eager = network().float()
    for alpha in eager.arch_parameters():
        alpha.data = alpha.data.float()
    fused = copy.deepcopy(eager)
    accelerate(fused)
    given = observed(fused, [x], fused.arch_parameters())
    reference = observed(eager, [x], eager.arch_parameters())
    for g, r, e in zip(given, reference, expected):
        allowed = 2 * (r - e).abs().max() + 1e-5 * (1 + e.abs().max())
        assert (g - e).abs().max() <= allowed


def test_half_precision_network_is_fused_and_near():
    exact = network()
    eager = copy.deepcopy(exact).bfloat16()
    fused = copy.deepcopy(eager)
    assert len(accelerate(fused).replaced) == 3
    x = torch.randn(8, 3, 16, 16)
    y, expected, given = exact(x.double()), eager(x.bfloat16()), fused(x.bfloat16())
    assert given.dtype == torch.bfloat16
    allowed = 2 * (expected - y).abs().max() + 2**-7 * y.abs().max()
    assert (given - y).abs().max() <= allowed


def test_architecture_step_with_frozen_parameters():
    eager = network()
    fused = copy.deepcopy(eager)
    accelerate(fused)
    x, target = torch.randn(4, 3, 16, 16).double(), torch.arange(4)
    grads = []
    for net in (eager, fused):
        net.requires_grad_(False)
        grads.append(torch.autograd.grad(net._loss(x, target), net.arch_parameters()))
    assert_same(grads[1], grads[0])


def test_the_users_own_training_loop():
    eager = network()
    fused = copy.deepcopy(eager)
    accelerate(fused)
    losses = []
    for net in (eager, fused):
        torch.manual_seed(3)
        sgd = torch.optim.SGD(net.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)
        adam = torch.optim.Adam(net.arch_parameters(), 3e-2, betas=(0.5, 0.999))
        losses.append([])
        for _ in range(3):
            for optimizer in (adam, sgd):
                x, target = torch.randn(4, 3, 16, 16).double(), torch.randint(10, (4,))
                optimizer.zero_grad()
                loss = net._loss(x, target)
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), 5)
                optimizer.step()
                losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-8)
    assert_same_state(fused, eager, 1e-8)
    assert_same(fused.arch_parameters(), eager.arch_parameters(), 1e-8)


@pytest.mark.parametrize("stride", [1, 2])
def test_own_noisy_skip_of_a_mixed_op(calls, stride):
    eager = MixedOp(C, stride, WITHOUT_NONE, noise=0.2).double()
    fused = copy.deepcopy(eager)
    (_, what), *_ = accelerate(fused).replaced
    assert what.startswith("6 of 7 candidates: mixed_edges; by its module 2: ")
    calls.clear()
    inputs = edge_inputs(7)
    assert_same(observed(fused, inputs), observed(eager, inputs))
    assert calls == {"deferred": 1}
    assert not torch.equal(fused(*inputs), fused(*inputs))


def test_own_noisy_skip_of_a_network(calls):
    eager = network(primitives=WITHOUT_NONE, noise=0.2)
    fused = copy.deepcopy(eager)
    report = accelerate(fused)
    assert len(report.replaced) == 3 * EDGES
    assert [name for name, _ in report.left] == ["cells.0", "cells.1", "cells.2"]
    assert "edge 0, candidate 2: NoisySkip is not laid out" in report.left[0][1]
    calls.clear()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    given = observed(fused, [x], fused.arch_parameters())
    assert calls == {"deferred": 3 * 2}  # one for each node
    assert_same(given, observed(eager, [x], eager.arch_parameters()))


def inverted_residual(affine, kernel):
    return nn.Sequential(
        nn.Conv2d(C, 3 * C, 1, bias=False),
        nn.BatchNorm2d(3 * C),
        nn.ReLU6(),
        nn.Conv2d(3 * C, 3 * C, kernel, padding=kernel // 2, groups=3 * C, bias=False),
        nn.BatchNorm2d(3 * C),
        nn.ReLU6(),
        nn.Conv2d(3 * C, C, 1, bias=False),
        nn.BatchNorm2d(C, affine=affine),
    )


def mixed(*ops, kind=MixedOp):
    module = kind(C, 1, ())
    module._ops.extend(ops)
    return module.double()


@pytest.mark.parametrize("affine", [False, True])
def test_other_candidates_fall_to_the_sums(calls, affine):
    ops = [inverted_residual(affine, kernel) for kernel in (3, 5, 7)]
    eager = mixed(*ops, nn.Identity())
    fused = copy.deepcopy(eager)
    (_, what), *_ = accelerate(fused).replaced
    assert "Sequential is not laid out as an operation of DARTS" in what
    expected = "mixed_sum" if affine else "mixed_norm_sum, 3 of them with batch norm"
    assert what.startswith(f"4 candidates: {expected}")
    calls.clear()
    inputs = edge_inputs(4)
    assert_same(observed(fused, inputs), observed(eager, inputs))
    assert calls == {"mixed_sum" if affine else "mixed_norm_sum": 1}
    assert_same_state(fused, eager)
    eager.eval(), fused.eval()
    assert_same(observed(fused, inputs), observed(eager, inputs))


def test_batch_norms_of_other_settings_stay_with_their_modules():
    ops = [inverted_residual(False, kernel) for kernel in (3, 5, 7)]
    ops[1][-1].eps = 1e-2
    ops[2][-1].register_forward_hook(lambda module, _, y: 2 * y)
    eager = mixed(*ops)
    fused = copy.deepcopy(eager)
    accelerate(fused)
    inputs = edge_inputs(3)
    assert_same(observed(fused, inputs), observed(eager, inputs))
    assert_same_state(fused, eager)


def test_terms_of_other_shapes_are_summed_by_broadcasting():
    eager = mixed(nn.AdaptiveAvgPool2d(1), nn.Identity())
    fused = copy.deepcopy(eager)
    accelerate(fused)
    inputs = edge_inputs(2)
    assert_same(observed(fused, inputs), observed(eager, inputs))


@pytest.mark.parametrize("kind", ["list of 0-dim", "list of floats", "keyword"])
def test_ways_to_give_the_weights(calls, kind):
    eager = MixedOp(C, 1).double()
    fused = copy.deepcopy(eager)
    accelerate(fused)
    calls.clear()
    x, w = (t.detach() for t in edge_inputs())
    weights = {"list of 0-dim": list(w), "list of floats": w.tolist(), "keyword": w}[kind]
    if kind == "keyword":
        assert_same([fused(x, weights=weights)], [eager(weights=weights, x=x)])
    else:
        assert_same([fused(x, weights)], [eager(x, weights)])
    assert calls == {"deferred": 1}


def test_cell_takes_weights_as_rows(calls):
    eager = cell()
    fused = copy.deepcopy(eager)
    accelerate(fused)
    calls.clear()
    s0, s1, w = cell_inputs()
    assert_same([fused(s0, s1, list(w))], [eager(s0, s1, list(w))])
    assert calls == {"run_cell": 1}


# ---- calls that the fused ops do not serve


@pytest.mark.parametrize("kind", ["autocast of fp16", "short weights", "frozen batch norm"])
def test_own_forward_where_the_fused_cannot(caplog, kind):
    say_once.cache_clear()
    eager = MixedOp(C, 1)
    fused = copy.deepcopy(eager)
    report = accelerate(fused)
    inputs = [t.detach().float().requires_grad_() for t in edge_inputs()]
    if kind == "short weights":
        inputs[1] = inputs[1].detach()[:3].clone().requires_grad_()
    for module in (eager, fused):
        if kind == "frozen batch norm":
            module._ops[1][1].eval()
    autocast = torch.autocast("cpu", torch.float16, enabled=kind == "autocast of fp16")
    with autocast, caplog.at_level(logging.WARNING):
        assert_same(observed(fused, inputs), observed(eager, inputs), 1e-5)
        fused(*inputs)
    # It is a matter of each candidate: the others are fused.
    served = {"autocast of fp16": 4, "short weights": 3, "frozen batch norm": 8}[kind]
    report.calls.clear()
    with autocast:
        fused(*inputs)
    assert report.calls.fused.total() == served
    reasons = {"autocast of fp16": 4, "short weights": 0, "frozen batch norm": 0}[kind]
    assert report.calls.own.total() == reasons
    said = [r.getMessage() for r in caplog.records if "runs its own forward" in r.getMessage()]
    assert bool(said) == bool(reasons)
    assert len(said) == len(set(said))  # each reason once, however many calls there were
