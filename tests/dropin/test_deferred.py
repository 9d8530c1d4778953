"""Sums that wait: what a candidate returns after accelerate, held to the module's own forward."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from accelerated import C, assert_same, assert_same_state, edge_inputs, observed
from public_darts import DilConv, Identity, MixedOp, SepConv
from torch import nn

import fastnas
from fastnas.dropin.deferred import DeferredSum


class Choice(nn.Module):
    """Two or more candidates, and what a network makes of them."""

    def __init__(self, body, *candidates):
        super().__init__()
        self.candidates = nn.ModuleList(candidates)
        self.body = body

    def forward(self, x, w):
        return self.body(self.candidates, x, w)


def pair(body, *candidates):
    torch.manual_seed(3)
    candidates = candidates or (SepConv(C, 3, 1), DilConv(C, 5, 1), Identity())
    eager = Choice(body, *candidates).double()
    fused = copy.deepcopy(eager)
    fastnas.accelerate(fused)
    return eager, fused


def assert_alike(eager, fused, inputs=None):
    inputs = inputs or edge_inputs(3)
    assert_same(observed(fused, inputs), observed(eager, inputs))
    assert_same_state(fused, eager)


BODIES = {
    "0-dim": lambda ops, x, w: sum(a * op(x) for a, op in zip(w, ops)),
    "from the right": lambda ops, x, w: sum(op(x) * a for a, op in zip(w, ops)),
    "[1]": lambda ops, x, w: w[:1] * ops[0](x) + ops[1](x) * w[1:2],
    "[1, 1, 1, 1]": lambda ops, x, w: w.view(3, 1, 1, 1, 1)[0] * ops[0](x) + ops[1](x),
    "numbers": lambda ops, x, w: 2 * ops[0](x) - ops[1](x) / 3 + (-ops[2](x)),
    "a number less a sum": lambda ops, x, w: 0 - ops[0](x) + ops[1](x),
    "products": lambda ops, x, w: w[0] * (w[1] * ops[0](x) + ops[1](x)) * 0.5,
    "over a scalar": lambda ops, x, w: ops[0](x) / w[0] + ops[1](x),
    "weight of 0": lambda ops, x, w: 0.0 * ops[0](x) + ops[1](x),
    "masks": lambda ops, x, w: ops[0](x) * (x[:, :1, :1, :1] > 0) + ops[1](x),
    "in place": lambda ops, x, w: ops[0](x).mul_(w[0]).add_(ops[1](x)).div_(2),
    "augmented": lambda ops, x, w: augmented(ops, x, w),
    "masked in place": lambda ops, x, w: ops[0](x).mul_((x[:, :1, :1, :1] > 0).double()) + x,
    "functions of torch": lambda ops, x, w: torch.add(torch.mul(w[0], ops[0](x)), ops[1](x)),
    "with alpha": lambda ops, x, w: torch.add(ops[0](x), ops[1](x), alpha=2),
    "stacked": lambda ops, x, w: torch.einsum("k,k...->...", w, torch.stack([op(x) for op in ops])),
    "concatenated": lambda ops, x, w: torch.cat([op(x) for op in ops], dim=1),
    "sliced": lambda ops, x, w: ops[0](x)[:, :2] * w[0] + ops[1](x)[:, 2:],
    "of slices": lambda ops, x, w: sum(a * op(x[:, :C]) for a, op in zip(w, ops)),
    "twice in a sum": lambda ops, x, w: twice(ops[0](x), w) + ops[1](x),
    "in two sums": lambda ops, x, w: in_two(ops[0](x), ops[1](x), w),
    "candidate of a sum": lambda ops, x, w: ops[1](w[0] * ops[0](x) + ops[2](x)),
    "called twice": lambda ops, x, w: ops[0](x) + w[0] * ops[0](2 * x) + ops[1](x),
    "unused": lambda ops, x, w: (ops[0](x), ops[1](x))[1],
    "a state": lambda ops, x, w: (h := ops[0](x) + x) * w[0] + ops[1](h) + ops[2](h),
    "item assignment": lambda ops, x, w: assigned(ops[0](x), ops[1](x)),
    "activations in place": lambda ops, x, w: activated(w[0] * ops[0](x) + ops[1](x)),
    "an alias that is changed": lambda ops, x, w: aliased(ops[0](x), w) + ops[1](x),
    "an identity that is changed": lambda ops, x, w: through_identity(ops, 1 * x, w),
    "a factor that is changed after it was used up": lambda ops, x, w: factor_again(ops, x, w),
    "numpy's numbers": lambda ops, x, w: np.float64(0.5) * ops[0](x) + ops[1](x) * np.float32(2),
    "dot product of sums": lambda ops, x, w: ops[0](x) * ops[1](x) + torch.lerp(ops[2](x), x, w[0]),
}


def augmented(ops, x, w):
    y = 0
    for a, op in zip(w, ops):
        y += a * op(x)
    y *= 2
    y -= x
    y /= 3
    return y


def twice(y, w):
    return w[0] * y + w[1] * y


def in_two(a, b, w):
    first = w[0] * a + b
    second = a - w[1] * b
    return first * second.tanh()


def activated(y):
    for module in (nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.Dropout):
        z = y + 0
        assert module(inplace=True)(z) is not None
        y = z * 2  # what the activation has left in z
    return y


def aliased(y, w):
    nn.functional.relu(y, inplace=True)
    y.data[:, 0] = 0
    return w[0] * y


def through_identity(ops, h, w):
    y = ops[2](h)
    nn.functional.relu(y, inplace=True)
    return h + w[0] * y + ops[0](h)


def factor_again(ops, x, w):
    factor = torch.full((), 2.0, dtype=x.dtype)
    with torch.no_grad():
        y = factor * (3 * ops[0](x))
        factor.fill_(7)
        y = y + ops[1](x)
    return y + w[0] * x


def assigned(a, b):
    a[:, 0] = 0
    return a + b


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", BODIES)
def test_a_sum_is_what_eager_computes(name, layout):
    x, w = edge_inputs(3)
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    assert_alike(*pair(BODIES[name]), [x, w])


@pytest.mark.parametrize("name", ["0-dim", "in two sums", "called twice", "a state"])
def test_in_evaluation(name):
    eager, fused = pair(BODIES[name])
    eager.eval(), fused.eval()
    assert_alike(eager, fused)
    inputs = [t.detach() for t in edge_inputs(3)]
    with torch.no_grad():
        assert_same([fused(*inputs)], [eager(*inputs)])
    with torch.inference_mode():
        assert_same([fused(*inputs)], [eager(*inputs)])


def candidate():
    _, fused = pair(BODIES["0-dim"])
    return fused.candidates


def test_nothing_is_computed_to_know_the_shape(monkeypatch):
    ops = candidate()
    x, _ = edge_inputs(3)
    monkeypatch.setattr("fastnas.dropin.pending.mixed_edges", None)
    y = ops[0](x) * 2 + ops[1](x)
    assert isinstance(y, torch.Tensor) and isinstance(y, DeferredSum)
    assert (y.shape, y.dtype, y.device, y.dim()) == (x.shape, x.dtype, x.device, 4)
    assert y.size(0) == 3 and y.size() == x.shape and y.ndim == 4
    monkeypatch.undo()
    assert y.isfinite().all()


def test_an_unused_output_moves_statistics_and_keeps_nothing_alive():
    ops = candidate()
    x = torch.randn(3, C, 8, 8).double()
    held = weakref.ref(x)
    ops[0](x)
    assert ops[0].op[3].num_batches_tracked == 1
    del x
    gc.collect()
    assert held() is None


def test_statistics_move_once_for_an_output_that_two_sums_read():
    ops = candidate()
    y = ops[0](edge_inputs()[0])
    (2 * y).sum(), (y + 1).sum(), y.sum()
    assert ops[0].op[3].num_batches_tracked == ops[0].op[7].num_batches_tracked == 1


def test_an_error_between_call_and_use():
    def body(ops, x, w):
        ops[0](x)
        raise KeyError("in the middle")

    eager, fused = pair(body)
    inputs = edge_inputs(3)
    for module in (eager, fused):
        with pytest.raises(KeyError):
            module(*inputs)
    assert_same_state(fused, eager)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook"])
@pytest.mark.parametrize("path", ["", "candidates.0", "candidates.1.op.1"])
def test_hooks_see_tensors(register, path):
    eager, fused = pair(BODIES["0-dim"])
    seen = []
    for module in (eager, fused):
        hook = lambda m, x, y: seen.append(type(y[0] if isinstance(y, tuple) else y))  # noqa: E731
        getattr(module.get_submodule(path), register)(hook)
    assert_alike(eager, fused)
    assert seen == [torch.Tensor] * 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_random_numbers_fall_on_the_same_elements(layout):
    def body(ops, x, w):
        y = w[0] * ops[0](x) + ops[1](x)
        return nn.functional.dropout(y) + torch.randn_like(ops[1](x)) * ops[2](x)

    eager, fused = pair(body)
    x, w = edge_inputs(3)
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    assert_alike(eager, fused, [x, w])


def test_outputs_are_copied_as_tensors():
    ops = candidate()
    with torch.no_grad():
        y = ops[0](edge_inputs()[0])
        duplicates = [copy.deepcopy(y), copy.copy(y), pickle.loads(pickle.dumps(y))]
    for again in duplicates:
        assert type(again) is torch.Tensor
        assert_same([again], [y])


def test_a_module_that_is_two_candidates():
    torch.manual_seed(3)
    shared = SepConv(C, 3, 1)
    eager = Choice(BODIES["0-dim"], shared, shared, Identity()).double()
    fused = copy.deepcopy(eager)
    fastnas.accelerate(fused)
    assert_alike(eager, fused)


def test_an_output_with_a_weak_reference_says_whether_it_requires_a_gradient():
    y = candidate()[0](edge_inputs()[0])
    held = weakref.ref(y)
    assert y.requires_grad and held() is y


def test_hooks_for_all_modules_see_tensors():
    _, fused = pair(BODIES["0-dim"])
    seen = []
    hook = lambda m, x, y: seen.append(type(y))  # noqa: E731
    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        fused(*edge_inputs(3))
    finally:
        handle.remove()
    assert len(seen) > 3 and set(seen) == {torch.Tensor}


def test_the_network_returns_tensors():
    _, fused = pair(BODIES["0-dim"])
    assert type(fused(*edge_inputs(3))) is torch.Tensor


def test_compiled_code_runs_the_own_forwards():
    eager, fused = pair(BODIES["0-dim"])
    inputs = edge_inputs(3)
    torch._dynamo.reset()
    assert_same([torch.compile(fused, backend="eager")(*inputs)], [eager(*inputs)])
    assert_same_state(fused, eager)


class Searched(nn.Module):
    """A network that its loop builds anew, as the unrolled step of DARTS does."""

    def __init__(self):
        super().__init__()
        self.op = MixedOp(C, 1)

    def new(self):
        return Searched()

    def forward(self, x, w):
        return self.op(x, w)


def test_a_new_network_is_accelerated_too():
    network = Searched()
    fastnas.accelerate(network)
    made = network.new()
    assert "forward" in vars(made.op._ops[4]) and "new" in vars(made)
    fastnas.decelerate(network)
    assert "new" not in vars(network) and "forward" not in vars(network.new().op._ops[4])


def test_the_report_counts_what_ran():
    network = Searched().double()
    network.op._ops[4].register_forward_hook(lambda *_: None)
    report = fastnas.accelerate(network)
    assert report.calls.total == 0 and "calls of candidates" not in str(report)
    network(*edge_inputs())
    assert report.calls.fused.total() == 7 and report.calls.share == 1
    assert "7 of 7 calls of candidates ran fused (100 %)" in str(report)
    report.calls.clear()
    network.op._ops[5].register_forward_hook(lambda *_: None)
    network(*edge_inputs())
    assert report.calls.fused.total() == 6
    assert dict(report.calls.own) == {("op._ops.5", "SepConv has hooks"): 1}
    assert "own forward, 1 times: SepConv has hooks" in str(report)
