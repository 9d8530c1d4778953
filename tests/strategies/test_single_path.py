"""Single-path methods: temperature, samples, options, derivation."""

import math

import pytest
import torch

from fastnas.nn import ArchParameters
from fastnas.spaces import Space, get_space
from fastnas.strategies import get_strategy

METHODS = ("rome", "rome-v1", "gdas", "single-path-darts")
SPACE = get_space("S0")
REAL = SPACE.without("none")


def taus(epochs, **options):
    strategy, seen = get_strategy("gdas", **options), []
    for epoch in range(epochs):
        strategy.start_epoch(epoch, epochs)
        seen.append(strategy.figures()["tau"])
    return seen


def test_temperature_schedules():
    assert taus(100)[::33] == pytest.approx([10, 6.7, 3.4, 0.1])
    assert taus(3, tau_schedule="exponential") == pytest.approx([10, 1, 0.1])
    assert taus(3, tau_schedule="exponential", tau_start=4, tau_end=1) == pytest.approx([4, 2, 1])
    assert taus(3, tau_schedule="constant", tau_start=0.5) == [0.5] * 3
    assert taus(1) == [10]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples is 0; a whole number is needed, 1 to 1024"),
        ({"tau_schedule": "cosine"}, "tau_schedule is 'cosine'; allowed: linear, exponential"),
        ({"tau_start": 0.0}, "tau_start is 0.0; a number is needed, 1e-06 to 1000000"),
        ({"tau_end": math.inf}, "tau_end is inf; a number is needed, 1e-06 to 1000000"),
        ({"tau_schedule": "constant", "tau_end": 1.0}, "tau_end is 1.0, but tau_schedule is const"),
        ({"arch_accumulation": "max"}, "arch_accumulation is 'max'; allowed: mean, sum"),
        ({"params_accumulation": "max"}, "params_accumulation is 'max'; allowed: mean, sum"),
        ({"clip_samples": "never"}, "clip_samples is 'never'; allowed: together, each"),
        ({"clip_samples": "each", "paths_at_once": True}, "paths_at_once gives one gradient"),
        ({"gdas_gradient": "executed"}, "gdas_gradient given, which method rome does not take"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        get_strategy("rome", **options)
    if "gdas_gradient" not in options:
        return
    with pytest.raises(ValueError, match="gdas_gradient is 'all'; allowed: executed, siblings"):
        get_strategy("gdas", gdas_gradient="all")


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_samples(method, at_once):
    strategy = get_strategy(method, samples=3, paths_at_once=at_once)
    space = strategy.space(SPACE)
    arch = ArchParameters(space, 1.0, strategy.topology)
    weights = strategy.forward_weights(arch)
    assert set(weights) == {"normal", "reduce"}
    for paths in weights.values():
        assert paths.choice.shape == ((3, 14) if at_once else (14,))
        there = paths.choice >= 0
        assert torch.equal(paths.weight.detach(), there.to(paths.weight))
        per_node = [row.sum(-1).tolist() for row in there.split([2, 3, 4, 5], -1)]
        expected = [2, 2, 2, 2] if method.startswith("rome") else [2, 3, 4, 5]
        assert per_node == [[n] * 3 if at_once else n for n in expected]
    sum(paths.weight.sum() for paths in weights.values()).backward()
    assert all(p.grad is not None for p in arch.parameters())


def test_cell_types_with_their_own_number_of_candidates():
    space = Space("uneven", (("skip_connect", "sep_conv_3x3"),) * 5, (("max_pool_3x3",),) * 5)
    strategy = get_strategy("rome", samples=2, paths_at_once=True)
    weights = strategy.forward_weights(ArchParameters(space, 1.0, "top2"))
    assert not weights["reduce"].choice.clamp(min=0).any()
    assert weights["normal"].choice.shape == (2, 5)


@pytest.mark.parametrize("method", METHODS)
def test_passes_in_turn_draw_what_one_pass_draws(method):
    drawn = []
    for at_once in (True, False):
        strategy = get_strategy(method, samples=3, paths_at_once=at_once)
        torch.manual_seed(1)
        arch = ArchParameters(strategy.space(SPACE), 1.0, strategy.topology)
        halves = [
            [strategy.forward_weights(arch)["reduce"].choice for _ in range(strategy.passes)]
            for _ in range(2)
        ]
        drawn.append([half[0] if at_once else torch.stack(half) for half in halves])
    assert all(torch.equal(a, b) for a, b in zip(*drawn))
    assert not torch.equal(*drawn[0])  # the halves of a step have their own


def arch_with(space, topology, alphas, betas=()):
    """Logits 0 but for {(edge, name): logit} and {index: logit}, of the normal cell."""
    arch = ArchParameters(space, 0.0, topology)
    with torch.no_grad():
        for (edge, name), logit in alphas.items():
            arch.normal[edge, space.normal[edge].index(name)] = logit
        for index, logit in dict(betas).items():
            arch.normal_edges[index] = logit
    return arch


ALPHAS = {(2, "sep_conv_3x3"): 9.0, (3, "dil_conv_5x5"): 1.0, (4, "skip_connect"): 2.0}


def test_rome_derives_edges_from_beta_alone():
    arch = arch_with(REAL, "top2", ALPHAS, {3: 0.2, 4: 0.1})
    genotype = get_strategy("rome").derive(arch, REAL)
    assert genotype.normal[1] == (("dil_conv_5x5", 1), ("skip_connect", 2))
    assert genotype.normal[0] == (("max_pool_3x3", 0), ("max_pool_3x3", 1))


def test_rome_v1_derives_the_best_pair():
    # Pairs of node 1 follow the one of node 0: (0, 1), (0, 2), (1, 2).
    arch = arch_with(REAL, "pairs", ALPHAS, {2: 0.2, 1: 0.1})
    genotype = get_strategy("rome-v1").derive(arch, REAL)
    assert genotype.normal[1] == (("sep_conv_3x3", 0), ("skip_connect", 2))


def test_gdas_keeps_entries_and_ignores_none():
    entries = {(2, "sep_conv_3x3"): 5.0, (2, "skip_connect"): 4.9, (3, "none"): 9.0}
    genotype = get_strategy("gdas").derive(arch_with(SPACE, "none", entries), SPACE)
    assert genotype.normal[1] == (("sep_conv_3x3", 0), ("skip_connect", 0))


def test_the_baseline_derives_as_darts():
    arch = arch_with(REAL, "none", ALPHAS)
    expected = get_strategy("darts").derive(arch, REAL)
    assert get_strategy("single-path-darts").derive(arch, REAL) == expected


@pytest.mark.parametrize("method", METHODS)
def test_validation_runs_the_likeliest_path(method):
    strategy = get_strategy(method)
    space = strategy.space(SPACE)
    betas = {3: 0.2, 4: 0.1} if method == "rome" else {}
    arch = arch_with(space, strategy.topology, ALPHAS, betas)
    choice = strategy.validation_weights(arch)["normal"].choice
    assert choice[3] == space.normal[3].index("dil_conv_5x5") or choice[3] == -1
    expected = {"rome": -1, "rome-v1": space.normal[2].index("sep_conv_3x3")}
    assert choice[2] == expected.get(method, space.normal[2].index("sep_conv_3x3"))
    assert (choice >= 0).sum() == (8 if method.startswith("rome") else 14)


def test_beta_is_in_the_state_and_starts_near_zero():
    arch = ArchParameters(REAL, 1e-3, "pairs")
    assert set(arch.state_dict()) == {"normal", "reduce", "normal_edges", "reduce_edges"}
    assert 0 < arch.normal_edges.abs().max() < 0.01
    assert arch.normal_edges.shape == (20,)
    assert set(ArchParameters(REAL).state_dict()) == {"normal", "reduce"}
