"""accelerate on a user's network: the results of the untouched one, and nothing else changed."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections import Counter

import pytest
import torch
from public_darts import WITHOUT_NONE, Cell, Identity, MixedOp, Network, SepConv, operation
from torch import nn
from torch.nn import functional as F

from fastnas import nn as own
from fastnas.nn import forwards
from fastnas.nn.accelerate import accelerate, decelerate
from fastnas.spaces import get_space

C = 4
EDGES = 5  # of a cell of two nodes


@pytest.fixture
def calls(monkeypatch):
    """How often each fused op was called; `calls.clear()` forgets the check of `accelerate`."""
    counts = Counter()

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for name in ("run_cell", "run_edge", "mixed_sum", "mixed_norm_sum"):
        monkeypatch.setattr(forwards, name, counted(name, getattr(forwards, name)))
    return counts


def network(layers=3, **options):
    torch.manual_seed(5)
    net = Network(C, 10, layers, nn.CrossEntropyLoss(), steps=2, multiplier=2, **options).double()
    for alpha in net.arch_parameters():
        alpha.data = torch.randn_like(alpha, dtype=torch.float64)
    return net


def cell(reduction=False, reduction_prev=False, **options):
    return Cell(2, 2, 6, 8, C, reduction, reduction_prev, **options).double()


def cell_inputs(reduction_prev=False, candidates=8, size=8):
    s0 = torch.randn(3, 6, size * (2 if reduction_prev else 1), size * (2 if reduction_prev else 1))
    s1 = torch.randn(3, 8, size, size)
    w = torch.randn(EDGES, candidates).softmax(-1)
    return [t.double().requires_grad_() for t in (s0, s1, w)]


def edge_inputs(candidates=8):
    x, w = torch.randn(3, C, 8, 8), torch.randn(candidates).softmax(-1)
    return [t.double().requires_grad_() for t in (x, w)]


def observed(module, inputs, extra=(), seed=9):
    """Output, gradients of inputs and parameters, buffers, after one call with a seed."""
    torch.manual_seed(seed)
    y = module(*inputs)
    leaves = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    leaves += [*extra, *module.parameters()]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    grads = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    zeros = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads)]
    return [y.detach(), *zeros, *(b.clone() for b in module.buffers())]


def assert_same(given, expected, tolerance=1e-10):
    assert len(given) == len(expected)
    for a, b in zip(given, expected):
        scale = 1 + float(b.detach().abs().max()) if b.numel() else 1
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


def assert_same_state(a, b, tolerance=1e-10):
    assert list(a.state_dict()) == list(b.state_dict())
    assert_same(list(a.state_dict().values()), list(b.state_dict().values()), tolerance)


# ---- results


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
    with torch.no_grad():
        assert_same([fused(x)], [eager(x)])
    assert calls == {"run_cell": 6}


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
    assert calls == {"run_edge": 1}


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
    assert what.startswith("6 of 7 candidates: mixed_edges; the rest mixed_sum (2: NoisySkip")
    calls.clear()
    inputs = edge_inputs(7)
    assert_same(observed(fused, inputs), observed(eager, inputs))
    assert calls == {"run_edge": 1, "mixed_sum": 1}
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
    assert calls == {"run_edge": 3 * EDGES, "mixed_sum": 3 * EDGES}
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
    assert calls == {"run_edge": 1}


def test_cell_takes_weights_as_rows(calls):
    eager = cell()
    fused = copy.deepcopy(eager)
    accelerate(fused)
    calls.clear()
    s0, s1, w = cell_inputs()
    assert_same([fused(s0, s1, list(w))], [eager(s0, s1, list(w))])
    assert calls == {"run_cell": 1}


# ---- calls that the fused ops do not serve


@pytest.mark.parametrize(
    "kind", ["autocast", "short weights", "frozen batch norm", "eval with grad"]
)
def test_own_forward_where_the_fused_cannot(calls, caplog, kind):
    forwards._say_once.cache_clear()
    eager = MixedOp(C, 1)
    fused = copy.deepcopy(eager)
    accelerate(fused)
    calls.clear()
    inputs = [t.detach().float().requires_grad_() for t in edge_inputs()]
    if kind == "short weights":
        inputs[1] = inputs[1].detach()[:3].clone().requires_grad_()
    for module in (eager, fused):
        if kind == "frozen batch norm":
            module._ops[1][1].eval()
        if kind == "eval with grad":
            module.eval()
    with torch.autocast("cpu", enabled=kind == "autocast"), caplog.at_level(logging.WARNING):
        for given, expected in zip(observed(fused, inputs), observed(eager, inputs)):
            assert torch.equal(given, expected)
        fused(*inputs)
    assert not calls
    assert caplog.text.count("MixedOp runs its own forward") == 1


# ---- nothing else changes


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
    assert calls["run_cell"] + calls["run_edge"] == (1 if noise is None else EDGES)
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
    assert len(seen) == 1 and calls == {"run_edge": EDGES, "mixed_sum": 1}


@pytest.mark.parametrize("path", ["_ops.2._ops.4.op.1", "_ops.1", "preprocess0"])
def test_a_hook_registered_later_is_called(calls, path):
    fused, seen = cell(), []
    accelerate(fused)
    inputs = cell_inputs()
    fused(*inputs)
    handle = fused.get_submodule(path).register_forward_hook(lambda *_: seen.append(1))
    calls.clear()
    fused(*inputs)
    assert len(seen) == 1 and not calls
    handle.remove()
    fused(*inputs)
    assert len(seen) == 1 and calls == {"run_cell": 1}


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
    assert not calls


# ---- what is left, and why


class NoisyMixedOp(MixedOp):
    def forward(self, x, weights):
        y = super().forward(x, weights)
        return y + 0.1 * torch.randn_like(y) if self.training else y


class PartialMixedOp(MixedOp):
    def forward(self, x, weights):
        half = x.shape[1] // 2
        x = torch.cat([0 * x[:, :half], x[:, half:]], dim=1)
        return super().forward(x, weights)


class DetachedMixedOp(MixedOp):
    def forward(self, x, weights):
        return super().forward(x, weights.detach())


class EvaluationMixedOp(MixedOp):
    def forward(self, x, weights):
        weights = weights if self.training else F.one_hot(weights.argmax(), len(weights))
        return super().forward(x, weights)


class SteppedMixedOp(MixedOp):
    def forward(self, x, weights, step):
        return super().forward(x, weights) * step


class PairMixedOp(MixedOp):
    def forward(self, x, weights):
        return super().forward(x, weights), x


class BrokenMixedOp(MixedOp):
    def forward(self, x, weights):
        raise RuntimeError("no such luck")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (NoisyMixedOp, "it computes something else: output differs by"),
        (PartialMixedOp, "it computes something else: output differs by"),
        (DetachedMixedOp, "it computes something else: gradient of input 1 differs by"),
        (EvaluationMixedOp, "it computes something else: output in evaluation mode differs by"),
        (SteppedMixedOp, "its forward takes (self, x, weights, step); (x, weights) is needed"),
        (PairMixedOp, "its forward returns a tuple, not a tensor"),
        (BrokenMixedOp, "its own forward fails on a random input: no such luck"),
    ],
)
def test_a_mixed_op_that_does_something_else_is_left(calls, kind, reason):
    module = kind(C, 1)
    report = accelerate(module)
    assert not report.replaced
    assert reason in report.left[0][1]
    assert "forward" not in vars(module)


def test_the_check_is_in_double_precision(monkeypatch):
    run_edge = forwards.run_edge
    monkeypatch.setattr(forwards, "run_edge", lambda *a, **k: (1 + 1e-6) * run_edge(*a, **k))
    what = dict(accelerate(MixedOp(C, 1)).replaced)["MixedOp"]
    assert "not fused: it computes something else: output differs by" in what


def test_without_the_check_the_caller_answers_for_it():
    module = NoisyMixedOp(C, 1).double()
    assert accelerate(module, check=False).replaced
    inputs = edge_inputs()
    assert_same([module(*inputs)], [MixedOp.forward(module, *inputs)])


class AuxiliaryCell(Cell):
    def forward(self, s0, s1, weights):
        return super().forward(s0, s1, weights) + s1.mean()


class DroppingCell(Cell):
    """A fourth argument, optional: calls with it run by the cell's own forward."""

    def forward(self, s0, s1, weights, drop=0.0):
        return F.dropout(super().forward(s0, s1, weights), drop)


def test_a_cell_that_does_something_else_is_left_but_not_its_mixed_ops():
    eager = AuxiliaryCell(2, 2, 6, 8, C, False, False).double()
    fused = copy.deepcopy(eager)
    report = accelerate(fused)
    assert "it computes something else: output differs by" in report.left[0][1]
    assert [name for name, _ in report.replaced] == [f"_ops.{e}" for e in range(EDGES)]
    inputs = cell_inputs()
    assert_same(observed(fused, inputs), observed(eager, inputs))


def test_an_optional_argument_is_served_by_the_own_forward(calls):
    eager = DroppingCell(2, 2, 6, 8, C, False, False).double()
    fused = copy.deepcopy(eager)
    accelerate(fused)
    calls.clear()
    inputs = cell_inputs()
    assert_same(observed(fused, inputs), observed(eager, inputs))
    assert calls == {"run_cell": 1}
    assert_same(observed(fused, [*inputs, 0.5]), observed(eager, [*inputs, 0.5]))
    assert calls == {"run_cell": 1}


def test_cells_of_a_derived_network_and_of_fastnas_are_left():
    derived = cell()
    derived._ops = nn.ModuleList(operation("sep_conv_3x3", C, 1) for _ in range(EDGES))
    assert "edge 0: SepConv has no ModuleList" in accelerate(derived).left[0][1]
    report = accelerate(own.SearchNetwork(get_space("S2"), C, 10, 1))
    assert not report.replaced
    assert {reason for _, reason in report.left} == {"it is fastnas' own and fused already"}


def test_a_forward_of_the_instance_is_left():
    module = MixedOp(C, 1)
    module.forward = lambda x, weights: x
    assert accelerate(module).left == [("MixedOp", "its instance has a forward of its own")]
    decelerate(module)
    assert "forward" in vars(module)


def test_the_report_is_a_table():
    lines = str(accelerate(network(primitives=WITHOUT_NONE, noise=0.2), check=False)).splitlines()
    assert lines[0] == "replaced (15)"
    assert lines[1].startswith(
        "  cells.0._ops.0 .. cells.2._ops.4 (15)  6 of 7 candidates: mixed_ed"
    )
    assert lines[2] == "left (3)"
    assert lines[3].startswith("  cells.0 .. cells.2 (3)  edge 0, candidate 2: NoisySkip")
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: accelerate("net"), TypeError, "model is a str; an nn.Module is needed"),
        (
            lambda: accelerate(Identity(), "small"),
            ValueError,
            "memory is 'small'; allowed: fast, lean, minimal",
        ),
        (lambda: accelerate(nn.Linear(2, 2)), ValueError, "Linear has no module with a ModuleList"),
        (lambda: accelerate(MixedOp(C, 1), backend="gpu"), ValueError, "backend is 'gpu'; allowed"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
