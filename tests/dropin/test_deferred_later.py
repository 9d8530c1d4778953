"""Sums that wait, where modes, tensors or gradients are others when they are used."""

from __future__ import annotations

import re

import pytest
import torch
from accelerated import C, assert_same, edge_inputs
from test_deferred import BODIES, assert_alike, candidate, pair
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint


def test_an_input_that_changes_before_the_output_is_used():
    ops = candidate()
    x = torch.randn(3, C, 8, 8).double()
    y = ops[0](x)
    x += 1
    with pytest.raises(RuntimeError, match=r"input of sep_conv_3x3, \[3, 4, 8, 8\], was changed"):
        y.sum()


@pytest.mark.parametrize(
    ("what", "make"),
    [
        ("a summand or factor, [3, 4, 8, 8],", lambda y, t: y + t),
        ("a summand or factor, [3, 4, 8, 8],", lambda y, t: t - 2 * y),
        ("a summand or factor, [],", lambda y, t: t[0, 0, 0, 0] * y),
    ],
)
@torch.no_grad()
def test_a_summand_or_factor_that_changes_before_the_sum_is_used(what, make):
    ops = candidate()
    x = torch.randn(3, C, 8, 8).double()
    t = x.clone()
    z = make(ops[0](x), t)
    t += 1
    with pytest.raises(RuntimeError, match=re.escape(f"{what} was changed before the sum")):
        z.sum()


@torch.no_grad()
def test_parameters_that_change_before_the_output_is_used():
    ops = candidate()
    y = ops[0](torch.randn(3, C, 8, 8).double())
    next(ops[0].parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="a parameter of sep_conv_3x3 was changed"):
        y.sum()


@pytest.mark.parametrize("watch", [lambda y: y.retain_grad(), lambda y: y.register_hook(print)])
def test_gradients_are_watched_before_the_output_is_used(watch):
    ops = candidate()
    x, w = edge_inputs(3)
    y = ops[0](x)
    z = w[0] * y
    with pytest.raises(RuntimeError, match="is part of a sum already"):
        watch(y)
    z += x
    watch(z)  # what was changed in place is in no other sum


def test_gradients_of_an_output_and_of_a_sum():
    def body(ops, x, w):
        y = ops[0](x)
        y.register_hook(lambda g: 3 * g)
        z = w[0] * y + ops[1](x)
        z.register_hook(lambda g: 2 * g)
        return z + y

    assert_alike(*pair(body))


def test_modes_and_tensors_are_those_of_the_call():
    eager, fused = pair(BODIES["0-dim"])
    x, _ = edge_inputs(3)
    outputs = []
    for module in (eager, fused):
        y = module.candidates[0](x)
        module.eval()
        z = module.candidates[0](x)
        module.train()
        with torch.no_grad():
            frozen = module.candidates[1](x)
            assert not y.sum().isnan()  # used without gradients, it has them all the same
        other = {n: 2 * p.detach() for n, p in module.candidates[1].named_parameters()}
        called = torch.func.functional_call(module.candidates[1], other, (x,))
        outputs.append([y + 0, z + 0, frozen + 0, called + 0])
    for given, expected in zip(outputs[1], outputs[0]):
        assert_same([given.detach()], [expected.detach()])
        assert (given.grad_fn is None) == (expected.grad_fn is None)


def test_an_autograd_function_is_given_a_tensor_or_says_so():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return 2 * y

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    with pytest.raises(RuntimeError, match=r"autograd.Function.* give it `output.clone\(\)`"):
        pair(lambda ops, x, w: Double.apply(ops[0](x)))[1](*edge_inputs(3))
    assert_alike(*pair(lambda ops, x, w: Double.apply(ops[0](x).clone()) + ops[1](x)))


def test_a_checkpoint_is_given_a_sum_that_waits():
    def body(ops, x, w):
        rest = lambda h: (w[1] * ops[0](h) + ops[1](h)).tanh()  # noqa: E731
        return checkpoint(rest, w[0] * ops[2](x) + ops[1](x), use_reentrant=False)

    assert_alike(*pair(body))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant):
    def body(ops, x, w):
        return sum(a * checkpoint(op, x, use_reentrant=reentrant) for a, op in zip(w, ops))

    eager, fused = pair(body)
    inputs = edge_inputs(3)
    results = []
    for module in (eager, fused):
        module(*inputs).square().sum().backward()
        results.append([p.grad for p in module.parameters()])
    assert_same(*results)


def test_inference_mode_around_the_use_or_the_call():
    eager, fused = pair(BODIES["0-dim"])
    x, _ = edge_inputs(3)
    results = []
    for module in (eager, fused):
        y = module.candidates[0](x)
        with torch.inference_mode():
            used = (2 * y).clone()
            called = module.candidates[1](x)
        assert called.is_inference() and y.grad_fn is not None
        results.append([used.tolist(), called.tolist(), y.tolist()])
    for given, expected in zip(*results):
        assert_same([torch.tensor(given)], [torch.tensor(expected)])


@pytest.mark.parametrize("training", [True, False])
def test_derivatives_of_forward_mode(training):
    eager, fused = pair(BODIES["0-dim"])
    x, w = (t.detach() for t in edge_inputs(3))
    results = []
    for module in (eager, fused):
        module.train(training)
        with forward_ad.dual_level():
            y = module(forward_ad.make_dual(x, x.cos()), w)
            results.append(list(forward_ad.unpack_dual(y)))
        if not training:  # torch refuses to move statistics in a transform
            results[-1] += torch.func.jvp(lambda x, m=module: m(x, w), (x,), (x.cos(),))
    assert_same(*results)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_transforms_run_the_own_forward(transform):
    eager, fused = pair(BODIES["0-dim"])
    eager.eval(), fused.eval()
    x, w = (t.detach() for t in edge_inputs(3))
    given, expected = (
        transform(lambda x, m=m: m(x, w).sum())(x if transform is torch.func.grad else x[:, None])
        for m in (fused, eager)
    )
    assert_same([given], [expected])
