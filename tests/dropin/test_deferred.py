"""Sums that wait: what a candidate returns after accelerate, held to the module's own forward."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from accelerated import C, assert_same, assert_same_state, edge_inputs, observed
from public_darts import DilConv, Identity, MixedOp, SepConv
from torch import nn
from torch.utils.checkpoint import checkpoint

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


def assigned(a, b):
    a[:, 0] = 0
    return a + b


@pytest.mark.parametrize("name", BODIES)
def test_a_sum_is_what_eager_computes(name):
    assert_alike(*pair(BODIES[name]))


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


def test_an_input_that_changes_before_the_output_is_used():
    ops = candidate()
    x = torch.randn(3, C, 8, 8).double()
    y = ops[0](x)
    x += 1
    with pytest.raises(RuntimeError, match=r"input of sep_conv_3x3, \[3, 4, 8, 8\], was changed"):
        y.sum()


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


def test_outputs_are_copied_as_tensors():
    ops = candidate()
    with torch.no_grad():
        y = ops[0](edge_inputs()[0])
        again = copy.deepcopy(y)
    assert type(again) is torch.Tensor
    assert_same([again], [y])


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
