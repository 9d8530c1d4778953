"""What a forward reads besides its arguments, in many ways: a plan sees it change, or is not made.

Found by somebody who tried to break plans: each was silently wrong once.
"""

from __future__ import annotations

import copy
import functools
import threading

import pytest
import torch
from accelerated import C
from public_darts import DilConv, Identity, SepConv
from test_plans import Holder, assert_alike, holder, inputs, planned
from torch import is_grad_enabled, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import fastnas

SCALE = [1.0]
POOL = nn.AvgPool2d(3, 1, 1)


class Settings:
    scale = 1.0

    def read(self):
        return self.scale


SETTINGS = Settings()


def pair(kind):
    torch.manual_seed(3)
    eager = kind(C).double()
    fused = copy.deepcopy(eager)
    fastnas.accelerate(fused)
    return eager, fused


def decorated(function):
    @functools.wraps(function)
    def wrapper(self, x, w):
        return SCALE[0] * function(self, x, w)

    return wrapper


def read(scale=SCALE):
    return scale[0]


class ByBase(Holder):
    def forward(self, x, w):
        return SCALE[0] * self.ops[0](x)


class BySuper(ByBase):
    def forward(self, x, w):
        return super().forward(x, w)


class ByDecorator(Holder):
    @decorated
    def forward(self, x, w):
        return self.ops[0](x)


class ByClass(Holder):
    scales = SCALE

    def forward(self, x, w):
        return self.scales[0] * self.ops[0](x)


class ByDefault(Holder):
    def forward(self, x, w):
        return read() * self.ops[0](x)


class ByPartial(Holder):
    read = functools.partial(read)

    def forward(self, x, w):
        return self.read() * self.ops[0](x)


class ByName(Holder):
    def mix_scaled(self, x):
        return SCALE[0] * self.ops[0](x)

    def forward(self, x, w):
        return getattr(self, "mix_" + "scaled")(x)


class ByTuple(Holder):
    nested = (SCALE,)

    def forward(self, x, w):
        return self.nested[0][0] * self.ops[0](x)


class ByItem(Holder):
    def __getitem__(self, place):
        return SCALE[place]

    def forward(self, x, w):
        return self[0] * self.ops[0](x)


class ByObject(Holder):
    def forward(self, x, w):
        return SETTINGS.read() * SCALE[0] * self.ops[0](x)


class ByOtherClass(Holder):
    def forward(self, x, w):
        return ByName.mix_scaled(self, x)


class ByCandidate(Holder):
    def __init__(self, channels):
        super().__init__(channels)
        self.ops[0].scales = SCALE

    def forward(self, x, w):
        return self.ops[0].scales[0] * self.ops[0](x)


KINDS = [
    ByBase, BySuper, ByDecorator, ByClass, ByDefault, ByPartial, ByName, ByTuple, ByItem, ByObject,
    ByOtherClass, ByCandidate,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_is_read_in_each_call(kind):
    eager, fused = pair(kind)
    if kind is ByCandidate:  # a copy has a list of its own
        fused.ops[0].scales = SCALE
    assert_alike(eager, fused)
    assert_alike(eager, fused)
    SCALE[0] = 3.0
    try:
        assert_alike(eager, fused)
    finally:
        SCALE[0] = 1.0
    assert_alike(eager, fused)


def test_a_count_in_a_closure_goes_on():
    (eager, _), (_, fused) = holder(counter()), holder(counter())
    for call in range(3):
        assert_alike(eager, fused, inputs(call))


def test_a_pool_that_is_no_part_is_seen():
    def forward(self, x, w):
        return torch.cat([self.ops[0](x), POOL(x)], dim=1)

    eager, fused = holder(forward)
    assert_alike(eager, fused)
    before = POOL.kernel_size, POOL.padding
    POOL.kernel_size, POOL.padding = 1, 0
    assert_alike(eager, fused)
    POOL.kernel_size, POOL.padding = before


# ---- what a forward does to its arguments, or asks of them


def retains(self, x, w):
    w.retain_grad()
    return self.mixed(x, w)


def hooks_weights(self, x, w):
    w.register_hook(lambda g: 2 * g)
    return self.mixed(x, w)


def bare(self, x, w):
    try:
        return self.ops[int(w.argmax())](x)
    except:  # noqa: E722
        return self.ops[0](x)


def by_parameters(self, x, w):
    large = self.ops[0].op[1].weight.abs().sum().item() > 0
    return self.mixed(x, w) if large else self.ops[0](x)


def by_the_norm(self, x, w):
    return self.mixed(x, w) if int(self.ops[0].op[3].num_batches_tracked) < 2 else self.ops[0](x)


def counter():
    calls = 0

    def forward(self, x, w):
        nonlocal calls
        calls += 1
        return (float(calls) * self.ops[0](x)).relu()  # no plan: it would be counted twice

    return forward


REFUSED = {
    "retains a gradient": retains,
    "a hook of weights": hooks_weights,
    "a bare except": bare,
    "parameters": by_parameters,
    "an imported mode": lambda self, x, w: (1.0 if is_grad_enabled() else 3.0) * self.ops[0](x),
    "a type": lambda self, x, w: self.ops[0](x) * (2.0 if type(w) is torch.Tensor else 3.0),
    "its argument": lambda self, x, w: x if w is None else self.mixed(x, w).relu(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_runs_itself(name):
    eager, fused = holder(REFUSED[name])
    for call in range(3):
        x, w = inputs(call)
        x2, w2 = inputs(call)
        y, expected = fused(x, w * 1), eager(x2, w2 * 1)
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(x.grad, x2.grad)
        torch.testing.assert_close(w.grad, w2.grad)
    if name == "an imported mode":
        with torch.no_grad():
            torch.testing.assert_close(fused(*inputs()), eager(*inputs()))
    assert planned(fused) == 0


def test_a_square_of_weights_may_be_transposed():
    """All of it has the same size as all of it transposed."""

    def forward(self, x, w):
        rows = torch.stack([w, w * w, w.exp()])
        return self.mixed(x, rows.t().softmax(0)[0])

    eager, fused = holder(forward)
    for call in range(3):
        assert_alike(eager, fused, inputs(call))


def test_own_tensors_that_lie_otherwise_are_looked_at():
    """Their sizes are no part of what is known of tensors that are not contiguous."""
    eager, fused = holder(lambda self, x, w: float(self.alpha.shape[0]) * self.ops[0](x))
    for size in (3, 4, 3):
        for module in (eager, fused):
            module.alpha = nn.Parameter(torch.ones(size, 2, dtype=torch.float64)[:, 0])
        assert_alike(eager, fused)


def test_a_candidate_of_its_own_counts_once():
    """Its batch norm would move in the call without values, too."""

    def forward(self, x, w):
        return sum(op(x) for op in self.ops)

    eager, fused = holder(forward)
    for module in (eager, fused):
        torch.manual_seed(1)
        own = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.Tanh()).double()
        module.ops.append(own)
    for call in range(2):
        assert_alike(eager, fused, inputs(call))


def test_whether_two_arguments_are_one():
    def forward(self, x, w, z):
        return self.ops[0](x) if x is z else self.ops[0](x) + self.ops[1](z)

    eager, fused = holder(forward)
    (x, w), (z, _) = inputs(), inputs(1)
    for other in (x, z, x, z):
        assert_alike(eager, fused, (x, w), other)
    assert planned(fused) == 2


def test_hooks_of_candidates_run_once_a_call():
    _, fused = holder(lambda self, x, w: self.mixed(x, w))
    fused(*inputs())
    given = []
    fused.ops[0].register_forward_pre_hook(lambda module, args: given.append(args[0].is_meta))
    for training in (True, False):
        fused.train(training)
        fused(*inputs())
    assert given == [False, False]


def test_fake_tensors_are_left_to_themselves():
    eager, fused = holder(lambda self, x, w: self.mixed(x, w))
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, w = torch.randn(3, C, 8, 8).double(), torch.rand(3).double()
        assert fused(x, w).shape == eager(x, w).shape


def test_threads_do_not_see_each_other():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.ops = nn.ModuleList((SepConv(C, 3, 1), DilConv(C, 5, 1), Identity()))

        def forward(self, x, w):
            return sum(a * op(x) for a, op in zip(w, self.ops))

    torch.manual_seed(3)
    eager = Sums().double().eval()
    expected = eager(*inputs())
    found, failed = [], []

    def run(module):
        try:
            found.extend(module(*inputs()) for _ in range(3))
        except Exception as error:
            failed.append(error)

    for _ in range(5):
        fused = copy.deepcopy(eager)
        fastnas.accelerate(fused)
        threads = [threading.Thread(target=run, args=(fused,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    for y in found:
        torch.testing.assert_close(y, expected)


def test_a_returned_argument_is_that_argument():
    eager, fused = holder(lambda self, x, w, k=None: x if k is None else self.mixed(x, w))
    vars(fused)["forward"].args[1].outermost = False  # as inside of a network
    for module in (eager, fused):
        x, w = inputs()
        x = x.detach()
        for _ in range(2):
            assert module(x, w) is x
        F.relu_(module(x, w))
        assert float(x.min()) == 0
