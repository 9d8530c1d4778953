"""Batch norms that keep no statistics, and normalise by the batch in every mode."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerated import EDGES, C, Mixed, cell_inputs
from accelerated import calls as calls
from compared import MODES, assert_same_state, state_after
from public_darts import Cell, MixedOp
from random_candidates import norms_of_another_kind

import fastnas
from fastnas.benchmarks.layouts.nb201_operations import operation


def untracked(module):
    return norms_of_another_kind(module, "untracked")


def darts(stride):
    return untracked(Mixed(*MixedOp(C, stride)._ops))


def biased():
    """Beside them stands one that keeps statistics."""
    names = ("dil_sepc_3x3", "dua_sepc_3x3", "nor_conv_3x3", "avg_pool_3x3")
    ops = [untracked(operation(name, C, 1, bias=True)) for name in names]
    return Mixed(*ops, operation("nor_conv_1x1", C, 1, bias=True))


BUILD = {"stride 1": lambda: darts(1), "stride 2": lambda: darts(2), "biases": biased}


@pytest.mark.parametrize("name", BUILD)
def test_candidates_are_fused_in_every_mode(name):
    torch.manual_seed(3)
    eager = BUILD[name]().double()
    fused = copy.deepcopy(eager)
    report = fastnas.accelerate(fused)
    x = torch.randn(3, C, 8, 8).double()
    for mode in ("training", *MODES, "training"):
        assert_same_state(
            state_after(fused, fused, (), x, mode), state_after(eager, eager, (), x, mode)
        )
    assert report.calls.share == 1


def test_one_value_per_channel_is_the_error_of_torch():
    _, fused = (copy.deepcopy(darts(1).eval()) for _ in range(2))
    fastnas.accelerate(fused)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        fused(torch.randn(1, C, 1, 1))


def test_a_cell_runs_its_own_forward_around_fused_candidates(calls):
    torch.manual_seed(2)
    eager = untracked(Cell(2, 2, 6, 8, C, False, False)).double().eval()
    fused = copy.deepcopy(eager)
    report = fastnas.accelerate(fused)
    assert dict(report.left)["Cell"].startswith("preprocess0: batch norm has track_running_stats")
    inputs = cell_inputs()
    calls.clear()
    torch.testing.assert_close(fused(*inputs), eager(*inputs), rtol=1e-10, atol=1e-10)
    assert calls["run_cell"] == 0 and report.calls.fused.total() == 8 * EDGES
