"""Modules that accelerate does not replace, and what it says of them."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerated import (
    EDGES,
    C,
    assert_same,
    cell,
    cell_inputs,
    edge_inputs,
    network,
    observed,
)
from accelerated import (
    calls as calls,
)
from public_darts import WITHOUT_NONE, Cell, Identity, MixedOp, operation
from torch import nn
from torch.nn import functional as F

from fastnas import nn as own
from fastnas.dropin import pending
from fastnas.dropin.accelerate import accelerate, decelerate
from fastnas.spaces import get_space


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
    "kind", [NoisyMixedOp, PartialMixedOp, DetachedMixedOp, EvaluationMixedOp, SteppedMixedOp]
)
def test_what_a_mixed_op_makes_of_its_candidates_is_its_own(calls, kind):
    eager = kind(C, 1).double()
    fused = copy.deepcopy(eager)
    report = accelerate(fused)
    assert dict(report.replaced) == {kind.__name__: "8 candidates: mixed_edges"}
    x, w = edge_inputs()
    inputs = [x, w, 3] if kind is SteppedMixedOp else [x, w]
    calls.clear()
    assert_same(observed(fused, inputs), observed(eager, inputs))
    assert calls == {"deferred": 1} and report.calls.share == 1
    eager.eval(), fused.eval()
    assert_same(observed(fused, inputs), observed(eager, inputs))


def test_a_mixed_op_that_returns_more_than_a_tensor(calls):
    eager = PairMixedOp(C, 1).double()
    fused = copy.deepcopy(eager)
    accelerate(fused)
    inputs = edge_inputs()
    for given, expected in zip(fused(*inputs), eager(*inputs)):
        assert type(given) is torch.Tensor
        assert_same([given], [expected])


def test_an_error_of_a_mixed_op_is_the_one_that_it_was():
    module = BrokenMixedOp(C, 1)
    accelerate(module)
    with pytest.raises(RuntimeError, match="no such luck"):
        module(*edge_inputs())


def test_the_check_is_in_double_precision(monkeypatch):
    mixed_edges = pending.mixed_edges
    wrong = lambda *a, **k: (1 + 1e-6) * mixed_edges(*a, **k)  # noqa: E731
    monkeypatch.setattr(pending, "mixed_edges", wrong)
    what = dict(accelerate(MixedOp(C, 1)).replaced)["MixedOp"]
    assert what.startswith("8 candidates: mixed_norm_sum")
    assert "not fused: it computes something else: output differs by" in what


def test_without_the_check_the_caller_answers_for_it():
    class Identity(nn.Module):  # of that name, but it is none
        def forward(self, x):
            return 2 * x

    module = MixedOp(C, 1).double()
    module._ops[3] = Identity()
    [(_, what)] = accelerate(module).replaced
    assert what.startswith("7 of 8 candidates: mixed_edges; by its module 3: it computes something")
    assert accelerate(module, check=False).replaced[0][1] == "8 candidates: mixed_edges"
    inputs = edge_inputs()
    given = module(*inputs)
    decelerate(module)
    module._ops[3] = nn.Identity()
    assert_same([given], [module(*inputs)])


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
    assert calls["run_cell"] == 1
    assert_same(observed(fused, [*inputs, 0.5]), observed(eager, [*inputs, 0.5]))
    assert calls["run_cell"] == 1


def test_cells_of_a_derived_network_and_of_fastnas():
    derived = cell()
    derived._ops = nn.ModuleList(operation("sep_conv_3x3", C, 1) for _ in range(EDGES))
    assert accelerate(derived).replaced == [("Cell", "5 candidates: mixed_edges")]
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
    assert "6 of 7 candidates: mixed_edges; by its module 2: NoisySkip is not" in lines[1]
    left = lines.index("left (3)")
    assert lines[left + 1].startswith("  cells.0 .. cells.2 (3)  edge 0, candidate 2: NoisySkip")
    assert len(lines) == left + 2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: accelerate("net"), TypeError, "model is .net.; Module is needed"),
        (
            lambda: accelerate(Identity(), "small"),
            ValueError,
            "memory is 'small'; allowed: fast, lean, minimal",
        ),
        (lambda: accelerate(nn.Linear(2, 2)), ValueError, "Linear has no operation of DARTS"),
        (lambda: accelerate(MixedOp(C, 1), backend="gpu"), ValueError, "backend is 'gpu'; allowed"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
