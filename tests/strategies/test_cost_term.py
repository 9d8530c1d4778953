"""Targets and their texts, the shares of what is derived, and the gradient of the expected cost."""

import math
from itertools import permutations

import pytest
import torch

from fastnas.nn import ArchParameters
from fastnas.reference.sample_paths import kept_by_logits
from fastnas.spaces import Space, get_space
from fastnas.strategies import STRATEGIES, get_strategy
from fastnas.strategies.cost import (
    CostTable,
    CostTarget,
    CostTerm,
    hinge,
    shares_of_weights,
)

WRONG = (
    *("", "macs", "macs:", ":3", "flops:3", "MACS:3", "macs:-1", "macs:0", "macs:nan", "macs:inf"),
    *("macs:1e19", "macs:1e999", "macs:3ms", "macs:3 ", " macs:3", "macs:1_0", "macs:three"),
    *("params:+3", "params:3M", "macs:\u0663", "macs:.5", "macs:0x3", "macs:3\n", "macs:1,5"),
    *("latency:12", "latency:ms", "latency:0ms", "latency:12 ms", "latency:12h", "latency:-1ms"),
)


@pytest.mark.parametrize("text", WRONG)
def test_wrong_texts(text):
    with pytest.raises(ValueError, match=r"^cost is .*; macs:NUMBER, params:NUMBER or latency:NUM"):
        CostTarget.of(text)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("macs:300e6", "macs", 3e8), ("params:3000000", "params", 3e6), ("macs:0.5", "macs", 0.5),
        ("latency:12ms", "latency", 12.0), ("latency:0.5s", "latency", 500.0),
        ("latency:250us", "latency", 0.25), ("macs:1.", "macs", 1.0), ("macs:1E+3", "macs", 1e3),
    ],
)  # fmt: skip
def test_right_texts(text, kind, value):
    assert CostTarget.of(text) == (kind, value)


def test_the_term_is_a_hinge():
    expected = torch.tensor([1.0, 4.0, 6.0, 8.0], dtype=torch.float64, requires_grad=True)
    term = hinge(expected, 4.0, 3.0)
    assert term.dtype == torch.float32 and term.tolist() == [0.0, 0.0, 1.5, 3.0]
    (gradient,) = torch.autograd.grad(term.sum(), expected)
    assert gradient[0] == 0 and gradient[2:].tolist() == [0.75, 0.75]


def test_probabilities_of_top2_are_those_of_a_draw_without_replacement():
    """Counted over all ordered draws."""
    beta = torch.randn(2 + 3 + 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = kept_by_logits(beta, [2, 3, 5], "top2").split([2, 3, 5])
    for row, kept in zip(beta.split([2, 3, 5]), found):
        p = row.softmax(0).tolist()
        wanted = [0.0] * len(p)
        for i, j in permutations(range(len(p)), 2):
            for k in (i, j):
                wanted[k] += p[i] * p[j] / (1 - p[i])
        torch.testing.assert_close(kept, torch.tensor(wanted, dtype=torch.float64))
        assert float(kept.sum()) == pytest.approx(2)


@pytest.mark.parametrize("topology", ["top2", "pairs"])
def test_probabilities_where_all_is_decided(topology):
    beta = torch.zeros(4 if topology == "top2" else 6, requires_grad=True)
    with torch.no_grad():
        beta[1] += 1000  # the edge 1, or the pair (0, 2)
        beta[2] += 900
    kept = kept_by_logits(beta, [4], topology)
    wanted = [0, 1, 1, 0] if topology == "top2" else [1, 0, 1, 0]
    assert kept.tolist() == pytest.approx(wanted, abs=1e-15)
    kept.square().sum().backward()
    assert beta.grad.isfinite().all()


def weights(space, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(space.edges), space.num_candidates("normal"), generator=generator)


def test_shares_of_a_node_add_up_to_its_edges_without_none():
    space = get_space("S0")
    s = shares_of_weights(weights(space), space, "normal")
    none = space.candidates("normal")[0].index("none")
    assert (s[:, none] == 0).all()
    nodes = torch.tensor([j - 2 for _, j in space.edges])
    by_node = torch.zeros(4, dtype=torch.float64).index_add(0, nodes, s.sum(-1))
    torch.testing.assert_close(by_node, torch.full((4,), 2.0, dtype=torch.float64))


def test_shares_of_nas_bench_201_add_up_to_one_an_edge():
    space = get_space("nb201")
    s = shares_of_weights(weights(space), space, "normal")
    torch.testing.assert_close(s.sum(-1), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("fewer", [False, True])
def test_shares_of_what_is_decided_are_what_is_kept(fewer):
    """One operation on two edges of each node, nothing on the others."""
    space = get_space("S2")
    w = torch.zeros(14, 2)
    for node in range(2, 6):
        into = [e for e, (_, j) in enumerate(space.edges) if j == node]
        w[into[0], 1] = w[into[-1], 0] = 1
    assert torch.equal(shares_of_weights(w, space, "normal", fewer), w.double())
    w[0] = 0  # a node with a single edge, as below a threshold
    s = shares_of_weights(w, space, "normal", fewer)
    assert s[1].sum() == (1 if fewer else 2)


@pytest.mark.parametrize("method", STRATEGIES)
@pytest.mark.parametrize("name", ["S0", "nb201"])
def test_the_gradient_is_that_of_finite_differences(method, name):
    strategy = get_strategy(method)
    try:
        space = strategy.space(get_space(name))
    except ValueError:
        pytest.skip("the method does not search that space")
    torch.manual_seed(0)
    arch = ArchParameters(space, 1.0, strategy.topology, strategy.tied).double()
    generator = torch.Generator().manual_seed(1)
    edges = {
        cell: [
            {op: float(torch.rand((), generator=generator)) for op in names}
            for names in space.candidates(cell)
        ]
        for cell in space.cell_types
    }
    term = CostTerm(CostTarget("macs", 1.0), 1.0, CostTable(3.0, edges), strategy.shares, space)
    logits = list(arch.parameters())
    with torch.no_grad():
        for p in logits:
            p.copy_(torch.randn(p.shape, generator=generator))
    expected = term.expected(arch)
    assert expected > 3
    gradients = torch.autograd.grad(expected, logits)
    for p, gradient in zip(logits, gradients):
        for i in range(0, p.numel(), 5):
            sides = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    p.view(-1)[i] += step
                    sides.append(float(term.expected(arch)))
                    p.view(-1)[i] -= step
            wanted = (sides[0] - sides[1]) / 2e-6
            assert float(gradient.reshape(-1)[i]) == pytest.approx(wanted, rel=1e-5, abs=1e-7)


def test_a_table_of_other_candidates_is_refused():
    space = Space("two", (("skip_connect", "sep_conv_3x3"),) * 2, (("skip_connect", "none"),) * 2)
    edges = {
        cell: [dict.fromkeys(names, 1.0) for names in space.candidates(cell)]
        for cell in space.cell_types
    }
    table = CostTable(0.0, edges)
    state = {"fixed": 2.0, "edges": {c: [dict(row) for row in rows] for c, rows in edges.items()}}
    table.load_state_dict(state)
    assert table.fixed == 2.0
    for value in (-1.0, math.nan, math.inf, 1, None):
        with pytest.raises(ValueError, match="no finite numbers of 0 or more"):
            table.load_state_dict({**state, "fixed": value})
    del state["edges"]["normal"][0]["skip_connect"]
    with pytest.raises(ValueError, match="of other candidates"):
        table.load_state_dict(state)
