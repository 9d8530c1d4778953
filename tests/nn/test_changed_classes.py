"""Classes, hooks and settings changed after a first call: the next call gives eager's results."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerated import C, cell_inputs
from accelerated import calls as calls
from changed import KINDS, SEP, SPACE, Dense, assert_alike, pickled
from changed import made as made
from changed import twins as twins
from public_darts import Cell
from torch import nn

import fastnas
from fastnas import nn as own
from fastnas import reference
from fastnas.nn.facts import Facts

# ---- what is changed for all modules at once


def doubled(forward):
    return lambda module, *x: 2 * forward(module, *x)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (nn.Conv2d, "forward"),
        (nn.BatchNorm2d, "forward"),
        (nn.Sequential, "forward"),
        (nn.Conv2d, "_conv_forward"),
        (nn.Module, "_call_impl"),
        (nn.Module, "__call__"),
    ],
)
@pytest.mark.parametrize("twins", KINDS, indirect=True)
def test_a_method_of_a_class_of_torch(twins, kind, method, monkeypatch):
    monkeypatch.setattr(kind, method, doubled(getattr(kind, method)))
    assert_alike(*twins)


@pytest.mark.parametrize("twins", KINDS, indirect=True)
def test_the_forward_of_a_class(twins, monkeypatch):
    eager, _, _ = twins
    part = eager._ops[0] if isinstance(eager._ops[0], Dense) else eager.get_submodule(SEP)
    monkeypatch.setattr(type(part), "forward", doubled(type(part).forward))
    assert_alike(*twins)


@pytest.mark.parametrize("twins", KINDS, indirect=True)
def test_a_hook_of_all_modules(twins):
    seen = []

    def hook(module, x, y):
        seen.append(type(module))
        return 2 * y if isinstance(module, nn.BatchNorm2d) else None

    eager, fused, inputs = twins
    with nn.modules.module.register_module_forward_hook(hook):
        assert_alike(eager, fused, inputs)
        assert_calls(eager, fused, inputs, seen)
    calls = len(seen)
    assert_alike(eager, fused, inputs)
    assert len(seen) == calls


def assert_calls(eager, fused, inputs, seen):
    """The fused module calls as many modules of each torch class as the eager one does."""
    counts = []
    for module in (eager, fused):
        seen.clear()
        module(*inputs)
        counts.append([sum(kind is k for k in seen) for kind in (nn.Conv2d, nn.BatchNorm2d)])
    assert counts[0] == counts[1] != [0, 0]


# ---- what a subclass of ours overrides


class OfTwice(own.MixedOp):
    def forward(self, x, w):
        return 2 * super().forward(x, w)


class SumOfTwice(own.MixedOp):
    def reduce(self, *arguments):
        return 2 * super().reduce(*arguments)


class MixOfTwice(own.MixedOp):
    def mix(self, *arguments):
        return 2 * super().mix(*arguments)


class EagerTwice(reference.MixedOp):
    def forward(self, x, w):
        return 2 * super().forward(x, w)


def cell_of(base, kind):
    return type("Cell", (base,), {"mixed_op": kind})(SPACE, "normal", 6, 8, C, False).double()


@pytest.mark.parametrize("kind", [OfTwice, SumOfTwice, MixOfTwice])
def test_what_a_subclass_overrides_is_run(kind):
    eager, fused = cell_of(reference.Cell, EagerTwice), cell_of(own.Cell, kind)
    fused.load_state_dict(eager.state_dict())
    assert_alike(eager, fused, cell_inputs())


# ---- settings of a user's own classes


class Scaled(Cell):
    def __init__(self, *args, scale=1.0):
        super().__init__(*args)
        self.scale = scale

    def forward(self, s0, s1, weights):
        return self._scaled(super().forward(s0, s1, weights))

    def _scaled(self, y):
        return self.scale * y


@pytest.fixture
def scaled_cells(request):
    eager = Scaled(2, 2, 6, 8, C, False, False).double()
    fused = copy.deepcopy(eager)
    assert not fastnas.accelerate(fused).left
    return eager, fused, cell_inputs()


@pytest.mark.parametrize("duplicate", [lambda m: m, copy.deepcopy, pickled])
def test_a_setting_changed_since_the_check(scaled_cells, calls, duplicate):
    eager, fused, inputs = scaled_cells
    eager.scale = fused.scale = 2.0
    fused = duplicate(fused)
    calls.clear()
    assert_alike(eager, fused, inputs)
    assert not calls["run_cell"]
    eager.scale = fused.scale = 1.0
    assert_alike(eager, fused, inputs)
    assert calls["run_cell"]


def test_a_helper_of_a_class(scaled_cells, monkeypatch):
    monkeypatch.setattr(Scaled, "_scaled", lambda module, y: 3 * y)
    assert_alike(*scaled_cells)


def test_a_helper_of_one_module(scaled_cells):
    eager, fused, inputs = scaled_cells
    eager._scaled = fused._scaled = lambda y: 3 * y
    assert_alike(eager, fused, inputs)


def test_marks_that_libraries_leave_are_no_settings(scaled_cells, calls):
    eager, fused, inputs = scaled_cells
    fused._is_wrapped = fused._ops[1]._is_wrapped = True
    calls.clear()
    assert_alike(eager, fused, inputs)
    assert calls["run_cell"]


def test_an_array_as_a_setting(scaled_cells):
    """Arrays have no one truth value to be compared by."""
    eager, fused, inputs = scaled_cells
    for module in (eager, fused):
        module._ops[0].mask = torch.ones(3)
        module(*inputs)
    for module in (eager, fused):
        module._ops[0].mask = torch.zeros(3)
    assert_alike(eager, fused, inputs)


# ---- what it costs


@pytest.mark.parametrize("twins", KINDS, indirect=True)
def test_modes_and_weights_may_change_without_reading_again(twins, monkeypatch):
    _, fused, inputs = twins
    read = []
    monkeypatch.setattr(Facts, "__init__", lambda facts, *parts: read.append(parts))
    with torch.no_grad():
        for p in fused.parameters():
            p.add_(1)
        for training in (False, True, False, True):
            fused.train(training)
            fused(*inputs)
    assert not read


@pytest.mark.parametrize("twins", ["fastnas", "accelerate"], indirect=True)
def test_update_bn_of_torch(twins):
    """It sets every momentum to None, and back."""
    eager, fused, inputs = twins
    data = [torch.randn_like(inputs[0]) for _ in range(3)]
    for module in (eager, fused):
        wrapped = OfOneInput(module, *inputs[1:])
        torch.optim.swa_utils.update_bn(data, wrapped)
    assert_alike(eager, fused, inputs)


class OfOneInput(nn.Module):
    def __init__(self, cell, *others):
        super().__init__()
        self.cell = cell
        self.others = others

    def forward(self, s0):
        return self.cell(s0, *self.others)
