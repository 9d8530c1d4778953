"""What accelerate leaves as it was: state, checkpoints, copies, hooks, operations exchanged."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from accelerated import (
    EDGES,
    C,
    assert_same,
    cell,
    cell_inputs,
    network,
    observed,
)
from accelerated import (
    calls as calls,
)
from public_darts import SepConv
from torch import nn

from fastnas.dropin.accelerate import accelerate, decelerate


def test_state_dict_checkpoints_and_optimizer_stay(tmp_path):
    net = network()
    before = copy.deepcopy(net.state_dict())
    modules, params = list(net.named_modules()), list(net.named_parameters())
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    torch.save(net.state_dict(), tmp_path / "before.pt")
    accelerate(net)
    assert list(net.named_modules()) == modules
    assert all(a[1] is b[1] for a, b in zip(net.named_parameters(), params))
    assert sgd.param_groups[0]["params"] == [p for _, p in params]
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    net(torch.randn(2, 3, 16, 16).double())
    net.load_state_dict(torch.load(tmp_path / "before.pt"))
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    network().load_state_dict(net.state_dict())


def test_the_check_leaves_no_trace():
    module = cell(noise=0.2)
    module.eval()
    module._ops[0]._ops[1].train()
    modes = [m.training for m in module.modules()]
    buffers = [b.clone() for b in module.buffers()]
    rng = torch.get_rng_state()
    with torch.no_grad():
        accelerate(module)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in module.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), buffers))
    assert all(p.grad is None and p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("noise", [None, 0.2])
def test_copies_are_accelerated_and_independent(calls, duplicate, noise):
    eager = cell(noise=noise)
    fused = copy.deepcopy(eager)
    accelerate(fused)
    inputs = cell_inputs()
    observed(copy.deepcopy(fused), inputs)  # a module that has run copies as well
    again = duplicate(fused)
    calls.clear()
    assert_same(observed(again, inputs), observed(eager, inputs))
    assert calls == ({"run_cell": 1} if noise is None else {"deferred": 2})
    fresh = cell(noise=noise)
    fresh.load_state_dict(fused.state_dict())
    for p in again.parameters():
        p.data.zero_()
    assert_same(observed(fused, inputs), observed(fresh, inputs))


def test_saving_the_whole_model():
    fused = network()
    accelerate(fused)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = torch.randn(2, 3, 16, 16).double()
    assert torch.equal(loaded(x), fused(x))


def test_functional_call_with_other_parameters(calls):
    eager = cell()
    fused = copy.deepcopy(eager)
    accelerate(fused)
    calls.clear()
    inputs = cell_inputs()
    params = {name: 2 + p.detach() for name, p in eager.named_parameters()}
    given, expected = (torch.func.functional_call(m, params, tuple(inputs)) for m in (fused, eager))
    assert_same([given], [expected])
    assert calls == {"run_cell": 1}


@pytest.mark.parametrize("noise", [None, 0.2])
def test_compiles_without_a_graph_break(noise):
    fused = cell(noise=noise)
    accelerate(fused)
    s0, s1, w = cell_inputs()
    torch.manual_seed(3)
    expected = fused(s0, s1, w)
    torch.manual_seed(3)
    torch._dynamo.reset()
    assert_same([torch.compile(fused, backend="eager", fullgraph=True)(s0, s1, w)], [expected])


@pytest.mark.parametrize("noise", [None, 0.2])
def test_decelerate_gives_the_own_forwards_back(calls, noise):
    eager = cell(noise=noise)
    fused = copy.deepcopy(eager)
    accelerate(fused)
    assert any("forward" in vars(m) for m in fused.modules())
    decelerate(fused)
    assert not any("forward" in vars(m) for m in fused.modules())
    calls.clear()
    inputs = cell_inputs()
    for given, expected in zip(observed(fused, inputs), observed(eager, inputs)):
        assert torch.equal(given, expected)
    assert not calls


def test_accelerating_twice_is_as_once(calls):
    eager = cell()
    fused = copy.deepcopy(eager)
    first = accelerate(fused, "fast")
    assert accelerate(fused, "minimal") == first
    assert fused.forward.args[1].memory == "minimal"
    calls.clear()
    inputs = cell_inputs()
    assert_same(observed(fused, inputs), observed(eager, inputs))
    assert calls == {"run_cell": 1}


# ---- hooks, and operations exchanged later


def test_hooks_of_a_cell_are_called_and_the_check_does_not_call_them(calls):
    fused, seen = cell(), []
    fused.register_forward_hook(lambda module, _, y: seen.append(y.shape))
    accelerate(fused)
    assert not seen
    calls.clear()
    y = fused(*cell_inputs())
    assert seen == [y.shape]
    assert calls == {"run_cell": 1}


def test_a_hook_on_an_operation_makes_it_run_by_its_module(calls):
    eager, seen = cell(), []
    fused = copy.deepcopy(eager)
    fused._ops[2]._ops[4].register_forward_hook(lambda *_: seen.append(1))
    report = accelerate(fused)
    assert "edge 2, candidate 4: SepConv has hooks" in report.left[0][1]
    assert len(report.replaced) == EDGES
    seen.clear(), calls.clear()
    inputs = cell_inputs()
    assert_same(observed(fused, inputs), observed(eager, inputs))
    assert len(seen) == 1 and calls == {"deferred": 2}


@pytest.mark.parametrize("path", ["_ops.2._ops.4.op.1", "_ops.1", "preprocess0"])
def test_a_hook_registered_later_is_called(calls, path):
    fused, seen = cell(), []
    accelerate(fused)
    inputs = cell_inputs()
    fused(*inputs)
    handle = fused.get_submodule(path).register_forward_hook(lambda *_: seen.append(1))
    calls.clear()
    fused(*inputs)
    assert len(seen) == 1 and calls["deferred"] and not calls["run_cell"]
    handle.remove()
    fused(*inputs)
    assert len(seen) == 1 and calls["run_cell"] == 1


def test_an_operation_exchanged_later_is_the_one_that_runs(calls):
    eager = cell()
    fused = copy.deepcopy(eager)
    accelerate(fused)
    inputs = cell_inputs()
    fused(*inputs)
    eager(*inputs)
    for module in (eager, fused):
        torch.manual_seed(1)
        module._ops[3]._ops[3] = SepConv(C, 7, 1).double()
    calls.clear()
    assert_same(observed(fused, inputs), observed(eager, inputs))
    assert calls == {"run_cell": 1}


def test_converted_batch_norms_run_by_their_modules(calls):
    fused = cell()
    accelerate(fused)
    inputs = cell_inputs()
    fused(*inputs)
    for op in fused._ops:
        op._ops[1][1] = nn.InstanceNorm2d(C).double()
    eager = copy.deepcopy(fused)
    decelerate(eager)
    calls.clear()
    assert_same(observed(fused, inputs), observed(eager, inputs))
    assert not calls["run_cell"]
