"""Black-box methods on distributions and on cells: what they propose, and whether it helps."""

import functools
from statistics import mean

import numpy as np
import pytest
import torch

from fastnas.blackbox import BLACK_BOX, get_black_box
from fastnas.blackbox.domains import Cells, Distributions, unseen_cell
from fastnas.blackbox.methods.base import Observation
from fastnas.spaces import get_space
from fastnas.spaces.distribution import slots_of
from fastnas.spaces.graph import GraphSlots
from fastnas.spaces.nb201 import NB201Slots

pytest.importorskip("botorch", reason="no BoTorch")

NB201 = NB201Slots()
DARTS = slots_of(get_space("S0"))
GRAPH = GraphSlots()
DOMAINS = [kind(layout) for kind in (Distributions, Cells) for layout in (NB201, DARTS, GRAPH)]


def ids(domain):
    return f"{type(domain).__name__}-{domain.layout.length}"


def value(domain, point):
    """Of a made-up cell; best are convolutions of 3x3, or of graphs."""
    slots = domain.layout.slots(domain.cell(point, np.random.default_rng(0)))
    return mean(0.3 + 0.6 * mean(map(is_good, s)) for s in slots.values())


def is_good(op):
    return op == "gcn" or ("3x3" in op and "conv" in op)


def is_point(domain, point):
    """Of the domain: each coordinate in its range, the counts of a cell type its length."""
    inside = all(0 <= value < size for value, size in zip(point, domain.sizes.values()))
    counts = (
        np.reshape(point, (-1, len(domain.layout.ops))) if domain.is_noisy else np.empty((0, 1))
    )
    whole = (counts.sum(1) == domain.layout.length).all()
    return len(point) == len(domain.sizes) and inside and bool(whole)


@pytest.mark.parametrize("domain", DOMAINS, ids=ids)
def test_points_and_their_neighbours(domain):
    rng = np.random.default_rng(0)
    for _ in range(20):
        point = domain.random(rng)
        near = domain.neighbours(point)
        assert is_point(domain, point) and len(near) == len(set(near)) and point not in near
        for other in near[:: max(1, len(near) // 7)]:
            assert is_point(domain, other)
            assert point in domain.neighbours(other)
        tallies = domain.tallies(point)
        assert [(row[:K].sum(), row.sum()) for row, (K, _) in zip(tallies, domain.choices)] == [
            (n, n) for _, n in domain.choices
        ]
        assert domain.from_tallies(tallies) == point
        assert domain.cell(point, rng) is not None
    assert domain.features([point, point]).shape == (2, len(domain.sizes))


def test_sizes_of_the_domains():
    assert len(Distributions(NB201).everything()) == 210
    assert Distributions(DARTS).everything() is None  # 9,018,009
    assert len(Cells(NB201).neighbours(Cells(NB201).random(np.random.default_rng(0)))) == 24
    assert len(Distributions(NB201).neighbours((2, 1, 1, 1, 1))) == 20


def searched(name, domain, budget, seed, batch=1, **options):
    method, rng, past = get_black_box(name, **options), np.random.default_rng(seed), []
    while len(past) < budget:
        for one in method.propose(domain, past, rng, batch):
            past.append(Observation(one.point, value(domain, one.point), one.origin))
    return past


@pytest.mark.parametrize("name", BLACK_BOX)
@pytest.mark.parametrize("layout", [NB201, DARTS, GRAPH], ids=["nb201", "darts", "graph"])
def test_every_method_searches_every_layout(name, layout):
    domain = get_black_box(name).domain(layout)
    assert isinstance(domain, Distributions) == name.startswith("anasod-")
    past = searched(name, domain, 12, 0, batch=2)
    assert all(is_point(domain, one.point) for one in past)
    assert [one.point for one in past] == [one.point for one in searched(name, domain, 12, 0, 2)]
    assert [one.point for one in past] != [one.point for one in searched(name, domain, 12, 1, 2)]


@pytest.mark.parametrize(
    "name",
    ["local", "anasod-local", "evolution", "bo", "anasod-bo", "reinforce", "anasod-reinforce"],
)
def test_it_is_better_than_random(name):
    random = "anasod-random" if name.startswith("anasod-") else "random"
    assert mean_best(name, *budget_of(name)) > mean_best(random, *budget_of(name))


def budget_of(name):
    """How many searches, and of how many evaluations: a Gaussian process takes its time."""
    return (3, 40) if "bo" in name else (30, 150)


@functools.cache
def mean_best(method, searches, budget):
    domain = get_black_box(method).domain(NB201)
    found = [searched(method, domain, budget, seed, batch=5) for seed in range(searches)]
    return mean(max(one.value for one in past) for past in found)


def test_local_search_moves_to_the_best_neighbour():
    domain, rng = Cells(NB201), np.random.default_rng(0)
    method, start = get_black_box("local"), domain.random(rng)
    past = [Observation(start, 0.5)]
    for i, _ in enumerate(domain.neighbours(start)):
        (step,) = method.propose(domain, past, rng)
        assert step.origin == start
        past.append(Observation(step.point, 0.6 if i == 3 else 0.4, step.origin))
    (step,) = method.propose(domain, past, rng)
    assert step.origin == past[4].point
    worse = [Observation(p, 0.1, past[4].point) for p in domain.neighbours(past[4].point)]
    (step,) = method.propose(domain, past + worse, rng)
    assert step.origin is None  # a top: it starts anew


def test_local_search_waits_for_the_evaluations_of_others():
    domain, rng = Cells(NB201), np.random.default_rng(0)
    start = domain.random(rng)
    past = [
        Observation(start, 0.5),
        *(Observation(p, 0.4, start) for p in domain.neighbours(start)),
    ]
    past[5] = Observation(past[5].point, None, start)
    (step,) = get_black_box("local").propose(domain, past, rng)
    assert step.origin is None


def test_evolution_lets_the_oldest_die():
    domain, rng = Cells(NB201), np.random.default_rng(0)
    method = get_black_box("evolution", population=3, sample=3)
    old = Observation(domain.random(rng), 0.9)
    young = [Observation(domain.random(rng), 0.1 * i) for i in (1, 2, 3)]
    (child,) = method.propose(domain, [old, *young[:2]], rng)
    assert child.origin == old.point and child.point in domain.neighbours(old.point)
    (child,) = method.propose(domain, [old, *young], rng)
    assert child.origin == young[2].point


def test_bayesian_optimisation_learns_and_believes():
    """It proposes what it has learned to be good, and no cell twice, evaluated already or not."""
    domain, rng = Cells(NB201), np.random.default_rng(0)
    past = searched("random", domain, 40, 3)
    method = get_black_box("bo")
    proposed = method.propose(domain, past, rng, 6)
    points = [one.point for one in proposed]
    assert len({*points, *(one.point for one in past)}) == 6 + len({one.point for one in past})
    assert mean(value(domain, p) for p in points) > mean(one.value for one in past) + 0.15
    waiting = [*past, *(Observation(p) for p in points)]
    (other,) = method.propose(domain, waiting, rng)
    assert other.point not in points


@pytest.mark.parametrize("domain", [Distributions(NB201), Cells(NB201)], ids=ids)
def test_the_posterior_is_botorchs(domain, monkeypatch):
    """Means, covariances, beliefs and log expected improvement, down to e^-1000 of it."""
    pytest.importorskip("botorch", reason="no BoTorch")
    from botorch.acquisition import LogExpectedImprovement

    from fastnas.blackbox import gaussian_process

    rng, models = np.random.default_rng(0), []

    def fitted(*arguments, **settings):
        models.append(model(*arguments, **settings))
        return models[-1]

    model = gaussian_process.SingleTaskGP
    monkeypatch.setattr(gaussian_process, "SingleTaskGP", fitted)
    past = searched("random", domain, 30, 3)
    asked = list(dict.fromkeys(domain.random(rng) for _ in range(40)))
    features = domain.features(asked)
    process = gaussian_process.Process(
        domain.features([one.point for one in past]),
        [one.value for one in past],
        features,
        categorical=domain.is_categorical,
    )
    theirs, x = models[0], torch.as_tensor(features)
    with torch.no_grad():
        best = theirs.posterior(theirs.train_inputs[0]).mean.max()
        for believed in (3, 17, 3, 0):
            expected = LogExpectedImprovement(theirs, best_f=best)(x.unsqueeze(1))
            torch.testing.assert_close(process.log_improvement(), expected, rtol=1e-6, atol=1e-6)
            point = x[believed : believed + 1]
            theirs = theirs.condition_on_observations(point, theirs.posterior(point).mean)
            process.believe(believed)


def test_a_small_domain_is_searched_whole():
    """16 cells, each once, and then again; of a distribution no cell twice while there are more."""
    domain = Cells(slots_of(get_space("S2"), 1))
    past = searched("bo", domain, 16 + 10, 0)  # the random start may repeat one
    assert len({one.point for one in past}) == 16
    spread, rng = Distributions(NB201), np.random.default_rng(0)
    seen = set()
    for _ in range(6):  # one operation in any of 6 slots
        seen.add(unseen_cell(spread, (5, 1, 0, 0, 0), rng, seen))
    assert len(seen) == 6
    assert (
        unseen_cell(spread, (6, 0, 0, 0, 0), rng, {spread.cell((6, 0, 0, 0, 0), rng)}) is not None
    )


def test_equal_accuracies_do_not_end_exploration():
    domain, rng = Cells(NB201), np.random.default_rng(0)
    past = [Observation(domain.random(rng), 0.9) for _ in range(300)]
    past.append(Observation(past[0].point, 0.899))
    assert np.abs(get_black_box("reinforce").logits(domain, past)).max() < 0.2


@pytest.mark.parametrize("domain", DOMAINS, ids=ids)
def test_reinforce_moves_along_the_score(domain):
    """Beside autograd's gradient of the log-probabilities of the draws, and a mean kept by hand."""
    method = get_black_box("reinforce", arch_rate=0.2)
    rng = np.random.default_rng(0)
    past = [Observation(domain.random(rng), float(rng.random())) for _ in range(6)]
    past.insert(2, Observation(domain.random(rng)))
    ours = method.logits(domain, past)
    theirs = [torch.zeros(K, dtype=torch.float64, requires_grad=True) for K, _ in domain.choices]
    known = [one for one in past if one.value is not None]
    average, variance = known[0].value, 0.0
    for one in known:
        tallies = [torch.tensor(row) for row in domain.tallies(one.point)]
        log_p = sum((row[: len(a)] * a.log_softmax(0)).sum() for row, a in zip(tallies, theirs))
        scores = torch.autograd.grad(log_p, theirs)
        deviation = one.value - average
        if variance:
            theirs = [
                (a.detach() + 0.2 * deviation / variance**0.5 * g).requires_grad_()
                for a, g in zip(theirs, scores)
            ]
        variance = 0.9 * variance + 0.1 * deviation**2
        average = 0.9 * average + 0.1 * one.value
    for row, other in zip(ours, theirs):
        assert row[: len(other)] == pytest.approx(other.detach().numpy())
        assert (row[len(other) :] == -np.inf).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("random", {"initial": 3}, "initial given, which method random does not take"),
        ("bo", {"initial": 1}, "initial is 1; a whole number is needed, 2 to 100000"),
        (
            "anasod-bo",
            {"concentration": 0.0},
            "concentration is 0.0; a number is needed, above 0 to 1000000",
        ),
        (
            "anasod-random",
            {"concentration": float("inf")},
            "concentration is inf; a number is needed, above 0",
        ),
        (
            "reinforce",
            {"arch_rate": float("inf")},
            "arch_rate is inf; a number is needed, above 0 to 10",
        ),
        ("reinforce", {"arch_rate": 0.0}, "arch_rate is 0.0; a number is needed, above 0 to 10"),
        ("evolution", {"population": 2}, "sample is 3; 1 to population, 2"),
        ("bohb", {}, "method is 'bohb'; allowed: anasod-bo, anasod-local, anasod-random"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_black_box(name, **options)
