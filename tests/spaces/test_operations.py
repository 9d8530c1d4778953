"""An operation is described once: a row of the table is all that builds, reads and runs it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastnas import nn as own
from fastnas import reference
from fastnas.dropin.recognise import candidate
from fastnas.layers.primitives import search_candidate
from fastnas.spaces import EDGE_OPS, Edge, EdgeTable, uniform_space
from fastnas.spaces.edge_table import edge_term
from fastnas.spaces.operations import EDGE_KINDS, OPERATIONS, Operation

C = 4
KNOWN = [name for name, op in OPERATIONS.items() if op.kinds]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", KNOWN)
def test_a_module_is_what_its_kind_says(name, stride):
    """Convolutions with their shapes, batch norms, and what the module is read back as."""
    module = search_candidate(name, C, stride)
    term = edge_term(name, 0, stride)
    table = EdgeTable(1, 1, 1, (Edge(0, 0, stride, (term,)),))
    assert [tuple(p.shape) for p in module.parameters()] == table.param_shapes(C)
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == table.norms == EDGE_KINDS[term.op].norms
    assert (candidate(module).name, candidate(module).stride) == (name, stride)


def test_the_rows_of_a_table_count_what_comes_before_each_term():
    names = ("sep_conv_5x5", "max_pool_3x3", "skip_connect", "dil_conv_3x3", "sep_conv_3x3")
    terms = tuple(edge_term(name, k, 2) for k, name in enumerate(names))
    rows = EdgeTable(1, 1, 5, (Edge(0, 0, 2, terms),)).rows
    assert [EDGE_OPS[row.op] for row in rows] == [
        "sep_conv", "max_pool", "reduce_skip", "dil_conv", "sep_conv",
    ]  # fmt: skip
    assert [(row.size, row.dilation, row.halves) for row in rows] == [
        (5, 1, 2), (0, 1, 0), (0, 1, 0), (3, 2, 1), (3, 1, 2),
    ]  # fmt: skip
    assert [(row.param, row.norm) for row in rows] == [(0, 0), (4, 2), (4, 3), (6, 4), (8, 5)]
    assert [(row.half, row.input, row.kept, row.skip) for row in rows] == [
        (0, 0, 0, -1), (-1, -1, -1, -1), (-1, -1, -1, 0), (2, -1, -1, -1), (3, 1, -1, -1),
    ]  # fmt: skip


@pytest.fixture
def wide(monkeypatch):
    """A candidate with a kernel that is compiled, but has no name of its own."""
    name = "wide_conv_7x7"
    monkeypatch.setitem(OPERATIONS, name, Operation(name, ("dil_conv", "dil_conv"), 7))
    monkeypatch.setattr("fastnas.reference.search_network.OPS", tuple(OPERATIONS))
    return name


def test_a_row_is_all_that_a_candidate_needs(wide):
    """It is built, fused, equal to its module, and recognised in a foreign network."""
    space = uniform_space("wide", ["skip_connect", wide], 2)
    eager = reference.Cell(space, "reduce", 6, 8, C, False).double()
    fused = own.Cell(space, "reduce", 6, 8, C, False).double()
    fused.load_state_dict(eager.state_dict())
    s0, s1 = torch.randn(2, 6, 8, 8).double(), torch.randn(2, 8, 8, 8).double()
    w = torch.randn(5, 2).softmax(-1).double()
    assert fused.why_not_fused(s1) is None
    torch.testing.assert_close(fused(s0, s1, w), eager(s0, s1, w), rtol=1e-10, atol=1e-10)
    assert candidate(search_candidate(wide, C, 1)).name == wide
