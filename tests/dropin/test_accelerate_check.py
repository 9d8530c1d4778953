"""What the check of accelerate sees and leaves as it was, and what it makes of weights of 0."""

from __future__ import annotations

import copy
import random
import threading

import numpy as np
import pytest
import torch
from accelerated import C, assert_same, edge_inputs, network, observed
from accelerated import (
    calls as calls,
)
from public_darts import Cell, MixedOp, Network
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastnas
from fastnas import nn as own
from fastnas import reference
from fastnas.dropin import whole
from fastnas.reference import SkipNoise
from fastnas.spaces import get_space

# ---- nothing that it runs is moved


class DecayingNoise(nn.Module):
    """As FairDARTS' noisy skip connection: the noise decays with the calls, which it counts."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.seen = []
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        if not self.training:
            return x
        self.calls += 1
        self.seen.append(x.shape)
        self.total += 1
        return x + torch.randn_like(x) / self.calls


class DrawsByPython(nn.Module):
    def forward(self, x):
        return x * (random.random() + np.random.rand()) if self.training else x  # noqa: NPY002


def with_operation(operation, stride=1):
    module = MixedOp(C, stride)
    module._ops[3] = operation
    return module.double()


def test_counters_and_caches_of_a_module_stay():
    module = with_operation(DecayingNoise())
    state = copy.deepcopy(module.state_dict())
    [(_, what)] = fastnas.accelerate(module).replaced
    assert what.startswith("7 of 8 candidates: mixed_edges")
    noise = module._ops[3]
    assert noise.calls == 0 and noise.seen == []
    assert all(torch.equal(module.state_dict()[key], value) for key, value in state.items())


def test_noise_that_decays_by_a_counter_is_as_without_accelerate():
    eager = with_operation(DecayingNoise())
    fused = copy.deepcopy(eager)
    fastnas.accelerate(fused)
    for _ in range(3):
        inputs = edge_inputs()
        assert_same(observed(fused, inputs), observed(eager, inputs))


def test_generators_of_python_and_numpy_stay():
    module = with_operation(DrawsByPython())
    random.seed(1), np.random.seed(1)  # noqa: NPY002
    expected = random.random(), np.random.rand()  # noqa: NPY002
    random.seed(1), np.random.seed(1)  # noqa: NPY002
    [(_, what)] = fastnas.accelerate(module).replaced
    assert what.startswith("7 of 8 candidates: mixed_edges")
    assert (random.random(), np.random.rand()) == expected  # noqa: NPY002


def test_what_cannot_be_copied_is_left():
    module = MixedOp(C, 1)
    module._ops[4].lock = threading.Lock()
    [(_, what)] = fastnas.accelerate(module).replaced
    assert "7 of 8 candidates" in what
    assert "by its module 4: no copy can be made of it, to be tried out: cannot pickle" in what


# ---- weights of 0


class Skips(MixedOp):
    """As DOTS, darts-pt, DrNAS: a candidate of weight 0 is not run."""

    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self._ops) if w != 0)


class SkipsSmall(MixedOp):
    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self._ops) if w > 1e-3)


class SkipsByItem(MixedOp):
    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self._ops) if w.item() > 0)


class SkippingCell(Cell):
    """The mixed ops of a cell that skips by itself."""

    def forward(self, s0, s1, weights):
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        first = 0
        for _ in range(self._steps):
            edges = range(first, first + len(states))
            first += len(states)
            states.append(
                sum(
                    w * op(x)
                    for e, x in zip(edges, list(states))
                    for w, op in zip(weights[e], self._ops[e]._ops)
                    if w != 0
                )
            )
        return torch.cat(states[-self._multiplier :], dim=1)


def step(module, *inputs):
    """The gradients, None where there are none, and the buffers."""
    module.zero_grad(set_to_none=True)
    module(*inputs).square().sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    return grads, dict(module.named_buffers())


def assert_same_step(fused, eager, *inputs):
    (grads, buffers), (expected, expected_buffers) = step(fused, *inputs), step(eager, *inputs)
    assert [name for name, g in grads.items() if g is None] == [
        name for name, g in expected.items() if g is None
    ]
    present = [name for name, g in expected.items() if g is not None]
    assert_same([grads[n] for n in present], [expected[n] for n in present])
    assert_same(list(buffers.values()), list(expected_buffers.values()))


@pytest.mark.parametrize("kind", [Skips, SkipsByItem, SkipsSmall])
def test_candidates_that_a_mixed_op_skips_are_not_run(calls, kind):
    eager = kind(C, 1).double()
    fused = copy.deepcopy(eager)
    [(_, what)] = fastnas.accelerate(fused).replaced
    assert what == "8 candidates: mixed_edges"
    x, w = edge_inputs()
    calls.clear()
    none_but_one = torch.eye(8).double()[4]
    some = w.detach().clone().index_fill(0, torch.tensor([1, 6]), 0)
    for weights in (w, none_but_one, some):
        assert_same_step(fused, eager, x, weights)
    assert calls == {"deferred": 3}
    assert fused._ops[1][1].num_batches_tracked == 1


def test_a_cell_that_skips_weights_of_0(calls):
    eager = SkippingCell(2, 2, 6, 8, C, False, False).double()
    fused = copy.deepcopy(eager)
    [(_, what)] = fastnas.accelerate(fused).replaced
    assert what.endswith("mixed_edges; by its own forward where a weight is 0")
    s0, s1 = torch.randn(3, 6, 8, 8).double(), torch.randn(3, 8, 8, 8).double()
    w = torch.rand(5, 8).double()
    calls.clear()
    assert_same_step(fused, eager, s0, s1, w)
    assert calls["run_cell"] == 1
    w[3, 5] = 0
    assert_same_step(fused, eager, s0, s1, w)
    assert calls["run_cell"] == 1


def test_a_plain_sum_runs_fused_at_weights_of_0(calls):
    eager = MixedOp(C, 1).double()
    fused = copy.deepcopy(eager)
    fastnas.accelerate(fused)
    calls.clear()
    x, _ = edge_inputs()
    assert_same_step(fused, eager, x, torch.eye(8).double()[4])
    assert calls == {"deferred": 1}


# ---- hooks on all candidates


def leaves_of(op):
    return [module for module in op.modules() if not list(module.children())]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("left", [(), (0,), (3,), (0, 3)], ids=str)
@pytest.mark.parametrize("depth", [lambda op: [op], leaves_of], ids=["operations", "layers"])
def test_hooks_on_all_candidates_or_almost(stride, left, depth):
    eager = MixedOp(C, stride).double()
    fused = copy.deepcopy(eager)
    fastnas.accelerate(fused)
    inputs = edge_inputs()
    assert_same(observed(fused, inputs), observed(eager, inputs))
    seen = []
    for module in (eager, fused):
        for k, op in enumerate(module._ops):
            for part in depth(op) if k not in left else ():
                part.register_forward_hook(lambda m, x, y: seen.append(tuple(y.shape)))
    expected = observed(eager, inputs)
    shapes, seen[:] = list(seen), []
    assert_same(observed(fused, inputs), expected)
    assert sorted(seen) == sorted(shapes) != []


def test_a_hook_on_every_module_of_a_network():
    eager = network()
    fused = copy.deepcopy(eager)
    fastnas.accelerate(fused)
    for net in (eager, fused):
        for module in net.modules():
            module.register_forward_hook(lambda m, x, y: None)
    x = torch.randn(2, 3, 16, 16).double()
    assert_same(
        observed(fused, [x], fused.arch_parameters()), observed(eager, [x], eager.arch_parameters())
    )


# ---- tensors without values


def search_network(kind, **options):
    return kind(get_space("S0"), 4, 10, 1, **options)


def weights(device=None):
    return {cell: torch.full((14, 8), 1 / 8, device=device) for cell in ("normal", "reduce")}


@pytest.mark.parametrize("noise", [None, SkipNoise()])
@pytest.mark.parametrize("training", [True, False])
def test_a_search_network_on_the_meta_device(training, noise):
    with torch.device("meta"), torch.set_grad_enabled(training):
        net = search_network(own.SearchNetwork, noise=noise).train(training)
        y = net(torch.rand(2, 3, 8, 8), weights())
    assert y.is_meta and y.shape == (2, 10)


@pytest.mark.parametrize("noise", [None, SkipNoise()])
def test_another_default_device_is_none_of_a_network(noise):
    net = search_network(own.SearchNetwork, noise=noise)
    x, w = torch.rand(2, 3, 8, 8), weights()
    torch.manual_seed(1)
    expected = net(x, w)
    torch.manual_seed(1)
    with torch.device("meta"):
        assert torch.equal(net(x, w), expected)


def test_fake_tensors():
    with FakeTensorMode():
        net = search_network(own.SearchNetwork, noise=SkipNoise())
        y = net(torch.rand(2, 3, 8, 8), weights())
        y.sum().backward()
        eager = search_network(reference.SearchNetwork)
        assert "have no values that could be compared" in fastnas.accelerate(eager).left[0][1]
        assert eager(torch.rand(2, 3, 8, 8), weights()).shape == y.shape == (2, 10)


@pytest.mark.parametrize("check", [True, False])
def test_accelerate_on_the_meta_device(check):
    with torch.device("meta"):
        net = search_network(reference.SearchNetwork)
        report = fastnas.accelerate(net, check=check)
        assert net(torch.rand(2, 3, 8, 8), weights()).is_meta
    assert "a tensor on the meta device has no values" in report.left[0][1]
    assert bool(report.replaced) == (not check)


def test_an_accelerated_network_moved_to_the_meta_device():
    net = search_network(reference.SearchNetwork)
    assert not fastnas.accelerate(net).left
    assert net.to("meta")(torch.rand(2, 3, 8, 8, device="meta"), weights("meta")).is_meta


def test_accelerate_where_another_device_is_the_default():
    net = search_network(reference.SearchNetwork)
    with torch.device("meta"):
        assert not fastnas.accelerate(net).left


def test_paths_without_values():
    op = own.MixedOp(["skip_connect", "none"], C, 1)
    paths = own.Paths(torch.zeros((), dtype=torch.int64, device="meta"), torch.ones(()))
    with pytest.raises(ValueError, match="choice is on the meta device; its values are needed"):
        op(torch.rand(2, C, 8, 8), paths)


class Unrolled(Network):
    def new(self):
        return network(2)


def test_cells_of_a_new_network_are_not_tried_out_again(monkeypatch):
    tried, disagreement = [], whole.disagreement

    def counted(module, *args):
        tried.append(module)
        return disagreement(module, *args)

    monkeypatch.setattr(whole, "disagreement", counted)
    torch.set_num_threads(2)  # trials run on one
    net = network(2)
    net.__class__ = Unrolled
    report = fastnas.accelerate(net)
    assert len(report.replaced) == len(tried) == 2 and torch.get_num_threads() == 2
    assert all("forward" in vars(cell) for cell in net.new().cells) and len(tried) == 2
