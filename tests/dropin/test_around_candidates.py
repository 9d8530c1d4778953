"""What lies around recognised candidates: inputs' preparation, `new`, forwards of instances."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerated import EDGES, C, assert_same, cell_inputs, edge_inputs, observed
from accelerated import calls as calls
from public_darts import Cell, DilConv, Identity, MixedOp, ReLUConvBN, SepConv
from torch import nn

import fastnas
from fastnas.nn.parts import Candidate


class Plain(ReLUConvBN):
    pass


class Scaled(ReLUConvBN):
    """Has the layers of a preprocessing, and makes something else of them."""

    def forward(self, x):
        return 3 * super().forward(x)


class Prepared(nn.Module):
    """No cell that could be read whole: one input, one edge."""

    def __init__(self, kind):
        super().__init__()
        self.before = kind(C, C)
        self.op = MixedOp(C, 1)

    def forward(self, x, w):
        return self.op(self.before(x), w)


@pytest.mark.parametrize("kind", [Plain, Scaled])
def test_what_prepares_an_input_is_tried_out(kind):
    torch.manual_seed(1)
    eager = Prepared(kind).double()
    fused = copy.deepcopy(eager)
    fastnas.accelerate(fused)
    assert ("forward" in vars(fused.before)) == (kind is Plain)
    inputs = edge_inputs()
    assert_same(observed(fused, inputs), observed(eager, inputs))


def masked(module):
    module.register_buffer("mask", torch.ones(2).double())


def counting(module):
    module.kept = {"factor": 1.0}


def with_arguments(module):
    module.kept = Arguments()


class Arguments:
    factor = 1.0


@pytest.mark.parametrize("keep", [masked, counting, with_arguments])
@pytest.mark.parametrize("path", ["", "_ops.1"])
def test_a_cell_that_keeps_what_may_change_runs_its_own_forward(calls, keep, path):
    """What is neutral when the forwards are compared may be changed without a write to a module."""

    class Kept(Cell):
        def forward(self, s0, s1, weights):
            module = self.get_submodule(path)
            if keep is masked:
                factor = module.mask[0]
            else:
                factor = module.kept["factor"] if keep is counting else module.kept.factor
            return factor * super().forward(s0, s1, weights)

    torch.manual_seed(2)
    eager = Kept(2, 2, 6, 8, C, False, False).double()
    keep(eager.get_submodule(path))
    fused = copy.deepcopy(eager)
    report = fastnas.accelerate(fused)
    assert report.calls.total == 0  # trials are not counted
    for network in (eager, fused):
        module = network.get_submodule(path)
        if keep is masked:
            module.mask[0] = 2.0
        elif keep is counting:
            module.kept["factor"] = 2.0
        else:
            module.kept.factor = 2.0
    inputs = cell_inputs()
    calls.clear()
    assert_same(observed(fused, inputs), observed(eager, inputs))
    assert calls == {"deferred": 1} and report.calls.share == 1


class Gained(ReLUConvBN):
    gain = 1.0

    def forward(self, x):
        return self.gain * super().forward(x)


def test_a_plain_value_of_a_class_that_changes(monkeypatch):
    eager = Prepared(Gained).double()
    fused = copy.deepcopy(eager)
    fastnas.accelerate(fused)
    assert "forward" in vars(fused.before)
    monkeypatch.setattr(Gained, "gain", 2.0)
    inputs = edge_inputs()
    assert_same(observed(fused, inputs), observed(eager, inputs))


def test_a_fused_cell_is_not_counted_by_its_trial():
    assert fastnas.accelerate(Cell(2, 2, 6, 8, C, False, False)).calls.total == 0


def test_preprocessing_that_looks_like_dense_candidates_is_no_choice():
    cell = Cell(2, 2, C, C, C, False, False)
    cell._ops[0]._ops[3] = nn.Tanh()
    report = fastnas.accelerate(cell)
    assert dict(report.left)["Cell"].startswith("edge 0, candidate 3: Tanh")
    assert [name for name, _ in report.replaced] == [f"_ops.{e}" for e in range(EDGES)]


def test_a_network_that_torchscript_compiled():
    with pytest.raises(TypeError, match="compiled by TorchScript; a plain Module is needed"):
        fastnas.accelerate(torch.jit.trace(nn.Sequential(nn.ReLU()), torch.ones(1)))


class Makes(Prepared):
    made = ()

    def __init__(self, kind=Plain):
        super().__init__(kind)

    def new(self, kind=Plain):
        return Makes(kind)


class Gains(Prepared):
    def __init__(self, gain=1.0):
        super().__init__(Gained)
        self.before.gain = gain

    def new(self, gain=1.0):
        return Gains(gain).double()


@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_a_new_network_may_have_other_settings(gain):
    network = Gains().double()
    fastnas.accelerate(network)
    torch.manual_seed(6)
    made = network.new(gain)
    torch.manual_seed(6)
    own = Gains(gain).double()
    assert all("forward" in vars(module) for module in (made.before, *made.op._ops[4:]))
    inputs = edge_inputs()
    assert_same(observed(made, inputs), observed(own, inputs))
    assert "new" in vars(made)


class MakesByClass(Makes):
    @classmethod
    def new(cls, kind=Plain):
        return cls(kind)


class MakesByNobody(Makes):
    @staticmethod
    def new(kind=Plain):
        return MakesByNobody(kind)


def test_new_takes_what_it_took():
    network = Makes()
    fastnas.accelerate(network)
    assert "forward" in vars(network.new().op._ops[4])
    assert type(network.new(kind=Scaled).before) is Scaled


@pytest.mark.parametrize("kind", [MakesByClass, MakesByNobody])
def test_a_new_that_belongs_to_the_class_stays(kind):
    network = kind()
    fastnas.accelerate(network)
    assert "new" not in vars(network)
    assert type(network.new(Scaled).before) is Scaled


class Nothing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2)])

    def new(self):
        return Nothing()


def test_a_network_without_candidates_is_as_it_was_after_the_error():
    network = Nothing()
    before = [dict(vars(module)) for module in network.modules()]
    with pytest.raises(ValueError, match="no operation of DARTS"):
        fastnas.accelerate(network)
    assert [dict(vars(module)) for module in network.modules()] == before


def test_candidates_of_a_module_whose_forward_is_its_own_are_left():
    network = Prepared(Plain).double()
    network.op.forward = lambda x, w: MixedOp.forward(network.op, x, w)
    report = fastnas.accelerate(network)
    assert ("op", "its instance has a forward of its own") in report.left
    assert not any("forward" in vars(op) for op in network.op._ops)


class Mixed(nn.Module):
    def __init__(self, *candidates):
        super().__init__()
        self.candidates = nn.ModuleList(candidates)

    def forward(self, x, w):
        return sum(a * op(x) for a, op in zip(w, self.candidates))


def dense(size):
    conv = nn.Conv2d(C, C, size, padding=size // 2, bias=False)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(C, affine=False))


def bare_pool():
    return nn.AvgPool2d(3, 1, 1, count_include_pad=False)


@pytest.mark.parametrize(
    ("candidates", "ops"),
    [
        ([SepConv(C, 3, 1), dense(3), Identity(), bare_pool(), DilConv(C, 5, 1)], 2),
        ([dense(1), dense(3), bare_pool(), Identity()], 1),
        ([SepConv(C, 3, 1), bare_pool(), Identity()], 2),
        ([SepConv(C, 3, 1), Identity()], 1),
    ],
)
def test_dense_candidates_are_computed_apart_from_depthwise_ones(calls, candidates, ops):
    eager = Mixed(*candidates).double()
    fused = copy.deepcopy(eager)
    fastnas.accelerate(fused)
    inputs = edge_inputs(len(candidates))
    calls.clear()
    assert_same(observed(fused, inputs), observed(eager, inputs))
    assert calls == {"deferred": ops}


def test_names_tell_dense_candidates():
    assert Candidate("plain_avg_pool_3x3", 1).is_dense and Candidate("nor_conv_1x1", 1).is_dense
    assert not Candidate("avg_pool_3x3", 1).is_dense and not Candidate("none", 1).is_dense
