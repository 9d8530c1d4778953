import math

import pytest
import torch

from fastnas.blackbox import BLACK_BOX
from fastnas.nn import ArchParameters
from fastnas.spaces import get_space, uniform_space
from fastnas.strategies import STRATEGIES, get_strategy
from fastnas.strategies.derivation import derive_top_edges

SPACE = get_space("S0")


def arch_with(space, entries):
    """Logits 0 but for {(cell, edge, op name): logit}."""
    arch = ArchParameters(space, scale=0.0)
    with torch.no_grad():
        for (cell, edge, name), logit in entries.items():
            getattr(arch, cell)[edge, space.candidates(cell)[edge].index(name)] = logit
    return arch


def test_darts_keeps_the_two_strongest_edges_and_ignores_none():
    arch = arch_with(
        SPACE,
        {
            ("normal", 2, "none"): 9.0,
            ("normal", 2, "sep_conv_3x3"): 8.0,
            ("normal", 3, "skip_connect"): 1.0,
            ("normal", 4, "dil_conv_5x5"): 2.0,
        },
    )
    genotype = get_strategy("darts").derive(arch, SPACE)
    # Edge 2 is split between none and sep_conv: softmax leaves sep_conv 0.27, dil_conv has 0.51.
    assert genotype.normal[1] == (("dil_conv_5x5", 2), ("skip_connect", 1))
    assert genotype.normal_concat == (2, 3, 4, 5)


def test_ties_go_to_the_first_operation_and_edge():
    genotype = get_strategy("darts").derive(ArchParameters(SPACE, scale=0.0), SPACE)
    assert genotype.normal == ((("max_pool_3x3", 0), ("max_pool_3x3", 1)),) * 4


def test_an_edge_with_nothing_but_none_cannot_be_derived():
    space = uniform_space("empty", ["none"])
    weights = {cell: torch.ones(14, 1) for cell in ("normal", "reduce")}
    with pytest.raises(ValueError, match="nothing but none"):
        derive_top_edges(weights, space)


def test_noisy_and_fair_darts_search_without_none():
    for name in ("noisy-darts", "fair-darts"):
        strategy = get_strategy(name)
        assert strategy.space(SPACE).num_candidates("normal") == 7
        assert strategy.space(get_space("S2")) == get_space("S2")
    assert get_strategy("darts").space(SPACE) is SPACE


def test_weights_are_softmax_or_sigmoid():
    arch = ArchParameters(SPACE, scale=1.0)
    softmax = get_strategy("darts").mixing_weights(arch)["normal"]
    torch.testing.assert_close(softmax.sum(-1), torch.ones(14))
    sigmoid = get_strategy("fair-darts").mixing_weights(arch)["normal"]
    torch.testing.assert_close(sigmoid, 1 / (1 + torch.exp(-arch.normal)))


@pytest.mark.parametrize("loss", ["l2", "l1"])
def test_zero_one_loss(loss):
    """Half of all entries at sigma = 0.9 or 0.1, the rest at 0.5: distances 0.4 and 0."""
    strategy = get_strategy("fair-darts", zero_one_loss=loss)
    space = strategy.space(SPACE)
    arch = ArchParameters(space, scale=0.0)
    logit = math.log(9)
    with torch.no_grad():
        arch.normal[:7] = logit
        arch.normal[7:] = -logit
    expected = -10 * (0.16 if loss == "l2" else 0.4) / 2
    assert float(strategy.regulariser(arch)) == pytest.approx(expected, rel=1e-5)


def test_fair_darts_drops_edges_below_the_threshold():
    strategy = get_strategy("fair-darts")
    space = strategy.space(SPACE)
    arch = arch_with(
        space,
        {
            ("normal", 0, "sep_conv_3x3"): 3.0,
            ("normal", 1, "skip_connect"): 1.0,
            ("reduce", 0, "max_pool_3x3"): 3.0,
        },
    )
    genotype = strategy.derive(arch, space)
    assert genotype.normal == ((("sep_conv_3x3", 0),), (), (), ())


def test_fair_darts_never_derives_an_empty_cell():
    strategy = get_strategy("fair-darts")
    space = strategy.space(SPACE)
    genotype = strategy.derive(ArchParameters(space, scale=0.0), space)
    assert all(len(node) == 1 for node in (*genotype.normal, *genotype.reduce))


def test_noise_options():
    strategy = get_strategy("noisy-darts", noise_kind="uniform", noise_factor=0.1)
    assert strategy.skip_noise().spread == pytest.approx(math.sqrt(0.3))
    assert strategy.noise_amplitude(25, 50) == 1.0
    decaying = get_strategy("noisy-darts", noise_decay="cosine")
    assert [decaying.noise_amplitude(e, 50) for e in (0, 25, 50, 60)] == pytest.approx(
        [1, 0.5, 0, 0]
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dart", {}, "method is 'dart'; allowed: anasod-darts, anasod-gdas, beta-darts, darts"),
        ("darts", {"noise_factor": 0.1}, "noise_factor given, which method darts does not take"),
        ("darts", {"order": 3}, "order is 3"),
        ("noisy-darts", {"noise_decay": "linear"}, "noise_decay is 'linear'"),
        ("noisy-darts", {"noise_kind": "cauchy"}, "noise_kind is 'cauchy'"),
        ("noisy-darts", {"skip_drop_path": 1.5}, "skip_drop_path is 1.5"),
        ("fair-darts", {"zero_one_loss": "l3"}, "zero_one_loss is 'l3'"),
        ("fair-darts", {"threshold": 2.0}, "threshold is 2.0"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_strategy(name, **options)


def test_every_strategy_names_its_source():
    for name, method in (STRATEGIES | BLACK_BOX).items():
        assert method.name == name and "arXiv" in method.source
