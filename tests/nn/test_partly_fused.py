"""A cell with foreign candidates: the others are fused, whatever made the foreign ones so."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerated import C, assert_same, assert_same_state, cell_inputs, observed
from changed import SEP, SPACE, one, own_forward, torch_seeded
from public_darts import SepConv
from torch import nn
from torch.overrides import TorchFunctionMode

from fastnas import nn as own
from fastnas import reference
from fastnas.nn import built
from fastnas.spaces import get_space


class Doubled(nn.Module):
    """An operation of the user's own."""

    def __init__(self, channels, stride):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, stride, bias=False)

    def forward(self, x):
        return 2 * self.conv(x)


def exchanged(cell):
    torch.manual_seed(4)
    cell._ops[1]._ops[4] = Doubled(C, 1).double()


def of_another_kernel(cell):
    cell._ops[1]._ops[4] = torch_seeded(lambda: SepConv(C, 5, 1).double())


CHANGES = {
    "an operation of the user's own": exchanged,
    "an operation of another kernel": of_another_kernel,
    "a frozen norm": lambda cell: cell.get_submodule(SEP).op[3].eval(),
    "eps of a norm": one(SEP + ".op.3", eps=0.1),
    "a forward of its own": own_forward(SEP),
    "a hook": lambda cell: cell.get_submodule(SEP).register_forward_hook(lambda m, x, y: 2 * y),
}


def cells(kind="normal", extra=None):
    eager = reference.Cell(SPACE, kind, 6, 8, C, False, extra=extra).double()
    ours = own.Cell(SPACE, kind, 6, 8, C, False, extra=extra).double()
    ours.load_state_dict(eager.state_dict())
    return eager, ours


class Convolutions(TorchFunctionMode):
    """Collects the weights of all convolutions that torch runs, without touching a module."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.conv2d:
            self.weights.append(args[1])
        return function(*args, **(kwargs or {}))


def called(module, inputs):
    """Names of the convolutions that run by their modules."""
    with Convolutions() as seen:
        module(*inputs)
    names = {id(p): name for name, p in module.named_parameters()}
    return {names[id(weight)] for weight in seen.weights}


@pytest.mark.parametrize("change", CHANGES)
def test_one_changed_candidate_runs_alone(change):
    eager, ours = cells()
    inputs = cell_inputs()
    for cell in (eager, ours):
        cell(*inputs)
        CHANGES[change](cell)
    assert_same(observed(ours, inputs), observed(eager, inputs))
    assert_same_state(ours, eager)
    assert "edge 1, candidate 4: " in ours.why_not_fused(inputs[1])
    names = called(ours, inputs)
    assert names and all(name.startswith(SEP) for name in names)


@pytest.mark.parametrize("kind", ["normal", "reduce"])
def test_an_own_operation_on_every_edge(kind):
    eager, ours = cells(kind, {"dil_conv_5x5": Doubled})
    inputs = cell_inputs()
    assert_same(observed(ours, inputs), observed(eager, inputs))
    assert_same_state(ours, eager)
    assert called(ours, inputs) == {f"_ops.{e}._ops.7.conv.weight" for e in range(5)}


def test_what_was_put_back_is_fused_again():
    _, ours = cells()
    inputs = cell_inputs()
    norm = ours.get_submodule(SEP).op[3]
    norm.eval()
    assert called(ours, inputs)
    norm.train()
    assert not called(ours, inputs)
    assert ours.why_not_fused(inputs[1]) is None


def test_nothing_is_fused_beside_what_overwrites_its_input():
    def overwriting(channels, stride):
        return nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 1, stride))

    _, ours = cells(extra={"dil_conv_5x5": overwriting})
    assert "overwrites its input" in ours.why_not_fused(cell_inputs()[1])


def test_a_copy_reads_itself():
    _, ours = cells()
    inputs = cell_inputs()
    ours(*inputs)
    twin = copy.deepcopy(ours)
    exchanged(twin)
    assert ours.why_not_fused(inputs[1]) is None
    assert "Doubled" in twin.why_not_fused(inputs[1])


def test_s4_runs_nothing_but_its_noise_by_modules():
    network = own.SearchNetwork(get_space("S4"), 4, 10, 3)
    weights = {kind: torch.full((14, 2), 0.5) for kind in ("normal", "reduce")}
    assert called(network, (torch.randn(2, 3, 8, 8), weights)) == {"stem.0.weight"}


def test_marks_that_no_forward_reads_make_nothing_foreign():
    _, ours = cells()
    inputs = cell_inputs()
    part = ours.get_submodule(SEP)
    part.label, part.op[3].mask = "third", torch.ones(3)
    assert not called(ours, inputs)


def test_reading_a_cell_draws_nothing():
    """What it is compared with is built anew, and must not move a seeded search."""
    _, ours = cells()
    torch.manual_seed(8)
    expected = torch.rand(3)
    torch.manual_seed(8)
    built._new_candidate.cache_clear()
    ours.parts()
    assert torch.equal(torch.rand(3), expected)
