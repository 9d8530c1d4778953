"""Distributions over operations: the simplex, the lattice, and cells with exact counts."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from scipy.stats import chisquare

from fastnas.spaces import DARTS_PRIMITIVES, from_darts, get_space, to_nb201
from fastnas.spaces.darts import DartsSlots
from fastnas.spaces.distribution import (
    OperationDistribution,
    lattice,
    lattice_size,
    slots_of,
    snap,
)
from fastnas.spaces.nb201 import NB201Slots

NB201 = NB201Slots()
DARTS = slots_of(get_space("S0"))


def test_snapping_stays_in_the_simplex():
    """10,000 points, lengths 1 to 100: whole, not negative, N in all, within one slot of N p."""
    rng = np.random.default_rng(0)
    for trial in range(10_000):
        p = rng.dirichlet(np.full(rng.integers(1, 12), (0.05, 1, 20)[trial % 3]))
        length = 1 + trial % 100
        counts = snap(p, length)
        assert sum(counts) == length and min(counts) >= 0
        assert np.abs(np.asarray(counts) - length * p).max() < 1 + 1e-6
        assert snap(np.asarray(counts) / length, length) == counts


@pytest.mark.parametrize(
    ("p", "length", "counts"),
    [
        ((0.5, 0.3, 0.2), 8, (4, 2, 2)),  # 4, 2.4, 1.6
        ((0.25, 0.25, 0.5), 2, (1, 0, 1)),  # 0.5, 0.5, 1: the first of equal remainders
        ((1 / 3, 1 / 3, 1 / 3), 4, (2, 1, 1)),
        ((0.1 + 0.2, 0.7), 10, (3, 7)),  # 3.0000000000000004 is 3
        ((0.29, 0.71), 100, (29, 71)),  # 28.999999999999996 is 29
    ],
)
def test_largest_remainders(p, length, counts):
    assert snap(p, length) == counts


def test_lattice():
    assert lattice_size(5, 6) == 210 and lattice_size(7, 8) == 3003
    for ops, length in ((5, 6), (7, 8), (1, 3), (3, 1)):
        points = list(lattice(ops, length))
        assert len(points) == len(set(points)) == lattice_size(ops, length)
        assert all(sum(point) == length and min(point) >= 0 for point in points)


@pytest.mark.parametrize("length", [1, 3, 4, 8, 16])
def test_cells_have_exactly_the_counts(length):
    layout, rng = DartsSlots(DARTS.ops, length), np.random.default_rng(length)
    for _ in range(50):
        drawn = OperationDistribution.dirichlet(layout, rng, 0.5)
        cell = drawn.sample(layout, rng)
        counts = drawn.counts(length)
        for cell_type, ops in layout.slots(cell).items():
            assert tuple(ops.count(op) for op in layout.ops) == counts[cell_type]
            for edges in cell.nodes(cell_type):
                assert len({source for _, source in edges}) == len(edges)
        assert OperationDistribution.of(cell, layout).counts(length) == counts


def test_placements_of_nb201_are_uniform():
    drawn = OperationDistribution(NB201.ops, {"normal": (0, 0, 2 / 6, 4 / 6, 0)})
    rng = np.random.default_rng(1)
    found = Counter(to_nb201(drawn.sample(NB201, rng)) for _ in range(6000))
    assert len(found) == 15
    assert chisquare(list(found.values())).pvalue > 1e-3


def test_placements_and_wirings_of_darts_are_uniform():
    layout = DartsSlots(("a", "b"), 3)
    drawn = OperationDistribution(layout.ops, {"normal": (2 / 3, 1 / 3), "reduce": (1, 0)})
    rng = np.random.default_rng(2)
    found = Counter(
        tuple(frozenset(edges) for edges in drawn.sample(layout, rng).normal) for _ in range(9000)
    )
    # aab: the first node reads 0 and 1, its slots in either order; the second one of 0, 1, 2.
    ways = {
        (frozenset([(one, 0), (two, 1)]), frozenset([(last, source)]))
        for one, two, last in permutations("aab")
        for source in range(3)
    }
    assert set(found) == ways
    assert chisquare([found[way] for way in sorted(ways, key=str)]).pvalue > 1e-3


def test_of_a_published_genotype():
    genotype = from_darts(
        "Genotype(normal=[('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 0),"
        " ('sep_conv_3x3', 1), ('skip_connect', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0),"
        " ('skip_connect', 2)], normal_concat=[2, 3, 4, 5], reduce=[('max_pool_3x3', 0),"
        " ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 0), ('max_pool_3x3', 0),"
        " ('skip_connect', 2), ('skip_connect', 2), ('avg_pool_3x3', 0)],"
        " reduce_concat=[2, 3, 4, 5])"
    )
    found = OperationDistribution.of(genotype, DARTS)
    shares = dict(zip(found.ops, found.p["normal"]))
    assert shares["sep_conv_3x3"] == 5 / 8 and shares["skip_connect"] == 3 / 8
    assert found.ops == tuple(op for op in DARTS_PRIMITIVES if op != "none")
    assert dict(zip(found.ops, found.p["reduce"]))["avg_pool_3x3"] == 1 / 8


@pytest.mark.parametrize(
    ("p", "message"),
    [
        ((0.5, 0.4), r"normal cell: the shares sum to 0.9; 1 is needed"),
        ((1.5, -0.5), r"a has 1.5; 0 to 1 is allowed"),
        ((-0.5, 1.5), r"a has -0.5; 0 to 1 is allowed"),
        ((float("nan"), 1.0), r"a is nan; a finite number is needed"),
        ((1.0,), r"1 shares are given for 2 operations: a, b"),
    ],
)
def test_what_is_no_distribution_is_refused(p, message):
    with pytest.raises(ValueError, match=message):
        OperationDistribution(("a", "b"), {"normal": p})


def test_what_does_not_fit_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="is none of cells"):
        OperationDistribution.dirichlet(NB201, rng).sample(DARTS, rng)
    with pytest.raises(ValueError, match="space S1 offers other candidates on other edges"):
        slots_of(get_space("S1"))
    with pytest.raises(ValueError, match="length is 8; cells of NAS-Bench-201 have 6 slots"):
        slots_of(get_space("nb201"), 8)
    assert slots_of(get_space("nb201")) == NB201 and slots_of(get_space("S0"), 16).nodes == 8
    with pytest.raises(ValueError, match="length is 0"):
        snap((1.0,), 0)
    with pytest.raises(ValueError, match="concentration is 0"):
        OperationDistribution.dirichlet(NB201, rng, 0)
    cell = OperationDistribution.dirichlet(DARTS, rng).sample(DARTS, rng)
    with pytest.raises(ValueError, match="the normal cell has"):
        OperationDistribution.of(cell, DartsSlots(("sep_conv_7x7",)))
