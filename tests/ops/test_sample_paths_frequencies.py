"""A million draws of sample_paths against exact probabilities, and samplers that are wrong."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from targets import Target
from torch import Tensor

from fastnas.ops import sample_paths

OP = "sample_paths"
DRAWS = 1_000_000
P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
# Two of three without replacement: (0, 1) first 0 then 1 or first 1 then 0, and so on.
PAIRS = torch.tensor(
    [P[i] * P[k] / (1 - P[i]) + P[k] * P[i] / (1 - P[k]) for i, k in ((0, 1), (0, 2), (1, 2))]
)
INCLUSION = torch.stack([1 - PAIRS[2], 1 - PAIRS[1], 1 - PAIRS[0]])
RNG = torch.tensor([20230811, 5])
# The others draw the same integers, here a million and in tests/ops/test_sample_paths.py a few.
MILLION = pytest.mark.backends("cpu", "cuda")


def check_frequencies(counts: Tensor, p: Tensor) -> None:
    """Chi-square over three categories, where P(X > x) = exp(-x/2), at one in a million."""
    assert len(counts) == len(p) == 3
    expected = float(counts.sum()) * p.double()
    x = float(((counts.double() - expected) ** 2 / expected).sum())
    assert x < 2 * math.log(1e6), f"chi-square {x:.1f}: {counts.tolist()}, not {expected.tolist()}"


def pair_counts(kept: Tensor) -> Tensor:
    """Of bool [draws, 3] with two kept in each: how often (0, 1), (0, 2), (1, 2)."""
    assert bool((kept.sum(-1) == 2).all())
    return (~kept).sum(0).flip(0).cpu()


def drawn(backend: Target, topology: str, logits: Tensor, **settings: object) -> Tensor:
    """op of a node with three edges and three operations, both with these logits; [draws, 3]."""
    beta = None if topology == "none" else logits.to(backend.device)
    return sample_paths(
        logits.expand(3, 3).to(backend.device), beta, nodes=(3,), topology=topology, paths=DRAWS,
        rng=RNG.to(backend.device), backend=backend.name, **{"tau": 1.0, **settings},
    ).op  # fmt: skip


def test_the_exact_values_are_those_of_the_paper() -> None:
    """Section 3.5: P(e in sample) = p_e + sum_i p_i p_e/(1 - p_i), i not e."""
    rest = [sum(P[i] * P[e] / (1 - P[i]) for i in range(3) if i != e) for e in range(3)]
    torch.testing.assert_close(P + torch.stack(rest), INCLUSION)
    assert [round(v, 4) for v in PAIRS.tolist()] == [0.5143, 0.3250, 0.1607]
    assert [round(v, 4) for v in INCLUSION.tolist()] == [0.8393, 0.6750, 0.4857]


@MILLION
def test_top_two_edges(backend: Target, dtype: torch.dtype) -> None:
    op = drawn(backend, "top2", P.log().to(dtype))
    check_frequencies(pair_counts(op >= 0), PAIRS)
    inclusion = (op >= 0).double().mean(0).cpu()
    torch.testing.assert_close(inclusion, INCLUSION, rtol=0, atol=6 * 0.5 / math.sqrt(DRAWS))


@pytest.mark.backends("eager")
def test_the_reference_draws_the_same_million(backend: Target) -> None:
    compiled = Target("cpu", "cpu", "cpu", "cpu")
    logits = P.log()
    assert torch.equal(drawn(backend, "top2", logits), drawn(compiled, "top2", logits))


@MILLION
def test_pairs(backend: Target, dtype: torch.dtype) -> None:
    op = drawn(backend, "pairs", P.log().to(dtype))
    check_frequencies(pair_counts(op >= 0), P)


@MILLION
@pytest.mark.parametrize("tau", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("shift", [0.0, 40.0])
def test_operations_at_every_temperature(backend: Target, tau: float, shift: float) -> None:
    op = drawn(backend, "none", P.log() + shift, tau=tau)
    for edge in op.unbind(-1):
        check_frequencies(edge.bincount(minlength=3).cpu(), P)


@MILLION
@pytest.mark.parametrize("topology", ["top2", "pairs"])
def test_operations_are_independent_of_the_edges_kept(backend: Target, topology: str) -> None:
    op = drawn(backend, topology, P.log())
    for edge in op.unbind(-1):
        check_frequencies(edge[edge >= 0].bincount(minlength=3).cpu(), P)
    both = op[(op[:, 0] >= 0) & (op[:, 1] >= 0)]
    for first in range(3):
        check_frequencies(both[both[:, 0] == first, 1].bincount(minlength=3).cpu(), P)


@MILLION
def test_four_edges_of_six_pairs(backend: Target) -> None:
    """Pairs of pairs: each of the six against a half, third and sixth of the rest."""
    beta = torch.tensor([0.5, 0.3, 0.2, 0.5, 0.3, 0.2], dtype=torch.float64).log()
    op = sample_paths(
        torch.zeros(4, 1, dtype=torch.float64, device=backend.device), beta.to(backend.device),
        nodes=(4,), topology="pairs", tau=1.0, paths=DRAWS, rng=RNG.to(backend.device),
        backend=backend.name,
    ).op  # fmt: skip
    kept = (op >= 0).cpu()
    counts = torch.stack([(kept[:, i] & kept[:, k]).sum()
                          for i, k in itertools.combinations(range(4), 2)])  # fmt: skip
    assert int(counts.sum()) == DRAWS
    check_frequencies(counts[:3], P)
    check_frequencies(counts[3:], P)


def largest_two(perturbed: Tensor) -> Tensor:
    return torch.zeros_like(perturbed).scatter(-1, perturbed.topk(2).indices, 1).bool()


def gumbels() -> Tensor:
    return -torch.empty(DRAWS, 3).exponential_().log()


def with_replacement() -> Tensor:
    """Two draws of one edge each, drawn again until they differ."""
    edges = torch.multinomial(P, 4 * DRAWS, replacement=True).view(-1, 2)
    edges = edges[edges[:, 0] != edges[:, 1]]
    return torch.zeros(len(edges), 3).scatter(-1, edges, 1).bool()


WRONG: dict[str, Callable[[], Tensor]] = {
    "with replacement": with_replacement,
    "no noise": lambda: largest_two(P.log().expand(DRAWS, 3)),
    "noise alone": lambda: largest_two(gumbels()),
    "probabilities in place of logits": lambda: largest_two(P + gumbels()),
    "normal noise": lambda: largest_two(P.log() + torch.randn(DRAWS, 3)),
    "noise at half its scale": lambda: largest_two(P.log() + gumbels() / 2),
    "noise 2 percent too large": lambda: largest_two(P.log() + 1.02 * gumbels()),
    "Gumbel of the other sign": lambda: largest_two(P.log() - gumbels()),
    "edges exchanged": lambda: largest_two(P.log() + gumbels())[:, [1, 0, 2]],
}


def test_a_right_sampler_passes() -> None:
    check_frequencies(pair_counts(largest_two(P.log() + gumbels())), PAIRS)


@pytest.mark.parametrize("sampler", WRONG)
def test_a_wrong_sampler_fails(sampler: str) -> None:
    with pytest.raises(AssertionError, match="chi-square"):
        check_frequencies(pair_counts(WRONG[sampler]()), PAIRS)
