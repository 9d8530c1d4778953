"""What the methods make of NAS-Bench-201: which space, which cell."""

import pytest
import torch

from fastnas.nn import ArchParameters
from fastnas.spaces import NB201_OPS, from_nb201, get_space, to_nb201
from fastnas.strategies import STRATEGIES, get_strategy

SPACE = get_space("nb201")
CELL = "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|skip_connect~0|avg_pool_3x3~1|nor_conv_1x1~2|"
SEARCHED = [
    name for name, kind in STRATEGIES.items() if kind.topology == "none" and not kind.chooses_edges
]


def arch_of(text, space, logit=3.0):
    """Logits that stand for a cell."""
    arch = ArchParameters(space)
    with torch.no_grad():
        for row, (op, _, _), names in zip(
            arch.normal, from_nb201(text).edges(), space.candidates("normal")
        ):
            row.fill_(-1.0)
            if op in names:
                row[names.index(op)] = logit
    return arch


@pytest.mark.parametrize("method", [name for name in SEARCHED if "anasod" not in name])
def test_the_strongest_operation_of_every_edge_none_included(method):
    strategy = get_strategy(method)
    space = strategy.space(SPACE)
    assert to_nb201(strategy.derive(arch_of(CELL, space), space)) == CELL


@pytest.mark.parametrize("method", SEARCHED)
def test_which_methods_search_with_none(method):
    operations = get_strategy(method).space(SPACE).operations
    assert operations == set(NB201_OPS) - ({"none"} if method == "fair-darts" else set())


@pytest.mark.parametrize("method", ["rome", "rome-v1", "p-darts"])
def test_topology_cannot_be_sampled(method):
    with pytest.raises(ValueError, match=f"{method} chooses which edges .* nb201 keeps them all"):
        get_strategy(method).space(SPACE)


def test_fair_darts_leaves_out_what_stays_below_the_threshold():
    strategy = get_strategy("fair-darts")
    space = strategy.space(SPACE)
    arch = arch_of(CELL, space)
    with torch.no_grad():
        arch.normal[4] = torch.tensor([-1.0, 1.0, 0.0, 0.5])  # sigma 0.73 < 0.85
    expected = CELL.replace("avg_pool_3x3~1", "none~1")
    assert to_nb201(strategy.derive(arch, space)) == expected
    lower = get_strategy("fair-darts", threshold=0.7)
    expected = CELL.replace("avg_pool_3x3~1", "nor_conv_1x1~1")
    assert to_nb201(lower.derive(arch, space)) == expected


def test_fair_darts_leaves_no_cell_without_a_way_through():
    strategy = get_strategy("fair-darts")
    space = strategy.space(SPACE)
    arch = arch_of(CELL, space, logit=1.0)
    ops = [op for op, _, _ in strategy.derive(arch, space).edges()]
    assert ops == [
        "nor_conv_3x3",
        "skip_connect",
        *(op for op, _, _ in from_nb201(CELL).edges()[2:]),
    ]
    assert from_nb201(CELL).is_connected


@pytest.mark.parametrize(
    ("text", "connected"),
    [
        (CELL, True),
        ("|none~0|+|none~0|skip_connect~1|+|none~0|skip_connect~1|skip_connect~2|", False),
        ("|none~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|", True),
        ("|none~0|+|skip_connect~0|none~1|+|none~0|none~1|nor_conv_1x1~2|", True),
        ("|skip_connect~0|+|skip_connect~0|skip_connect~1|+|none~0|none~1|none~2|", False),
    ],
)
def test_is_connected(text, connected):
    assert from_nb201(text).is_connected == connected


@pytest.mark.parametrize("samples", [1, 3])
def test_every_edge_is_sampled(samples):
    strategy = get_strategy("gdas", samples=samples, paths_at_once=True)
    arch = arch_of(CELL, SPACE, logit=0.0)
    seen = set()
    for _ in range(40):
        weights = strategy.forward_weights(arch)
        assert set(weights) == {"normal"}
        assert weights["normal"].choice.shape == (samples, 6)
        seen |= {(e, int(k)) for row in weights["normal"].choice for e, k in enumerate(row)}
    assert len(seen) == 30
    likeliest = strategy.validation_weights(arch_of(CELL, SPACE))["normal"].choice
    assert [NB201_OPS[k] for k in likeliest] == [op for op, _, _ in from_nb201(CELL).edges()]
