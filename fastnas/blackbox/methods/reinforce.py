"""Follows the gradient of the expected accuracy, where the accuracy itself has none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastnas.blackbox.domains import Distributions, Domain
from fastnas.blackbox.methods.base import BlackBox, Observation
from fastnas.bounds import Bounds
from fastnas.options import option
from fastnas.spaces.distribution import ANASOD
from fastnas.spaces.slots import SlotLayout, check_layout

DECAY = 0.9
"""Of the moving mean and variance of the accuracies."""
LEAST_STD = 1e-3
"""A step after many equal accuracies would end all exploration."""
RATES = Bounds(0, 10, above=True)


class Reinforce(BlackBox):
    """Moves logits for each choice of a point by the score function; points are draws.

    alpha <- alpha + rate (y - mean y) / std y grad log p(point; alpha), an estimate of the gradient
    of E[y]; mean and std are moving ones. Of a cell each slot (and each node's wiring) has logits
    of its own. Of a distribution all slots of a cell type share theirs, so that a point is the
    count of draws from one softmax: the tied logits of `anasod-darts`, where a table is in place
    of the supernet.

    The rates are the best of 0.02, 0.05, ... 0.8 on NAS-Bench-201, 40 seeds.
    """

    name = "reinforce"
    source = "Williams, 1992; on cells as Dong & Yang, ICLR 2020, arXiv 2001.00326"

    arch_rate: float = option(0.1, "step of the logits", RATES)

    def _propose(
        self, domain: Domain, past: Sequence[Observation], rng: np.random.Generator, count: int
    ) -> list[Observation]:
        shares = softmax(self.logits(domain, past))
        drawn = (
            [rng.multinomial(n, p[:K]) for (K, n), p in zip(domain.choices, shares)]
            for _ in range(count)
        )
        return [Observation(domain.from_tallies(tallies)) for tallies in drawn]

    def logits(self, domain: Domain, past: Sequence[Observation]) -> NDArray[np.float64]:
        """Returns [choices, K] after the observations in turn; -inf beyond a choice's K."""
        K, n = np.array(domain.choices).T[..., None]
        # -inf gives a share of exactly 0 beyond the K of a choice, so rows of several lengths fit
        # into one array.
        alpha = np.where(np.arange(K.max()) < K, 0.0, -np.inf)
        known = [(one.point, one.value) for one in past if one.value is not None]
        # The mean begins at the first accuracy: from 0 the first steps would all point upwards.
        mean, variance = known[0][1] if known else 0.0, 0.0
        for point, value in known:
            deviation = value - mean
            if variance:
                # This is grad log p of a multinomial: counts less their expectation n p.
                score = domain.tallies(point) - n * softmax(alpha)
                alpha += self.arch_rate * deviation / max(variance**0.5, LEAST_STD) * score
            mean += (1 - DECAY) * deviation
            variance = DECAY * variance + (1 - DECAY) * deviation**2
        return alpha


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Normalises exponentials over the last axis."""
    found: NDArray[np.float64] = np.exp(logits - logits.max(-1, keepdims=True))
    return found / found.sum(-1, keepdims=True)


class AnasodReinforce(Reinforce):
    """Searches distributions by gradient, where there is no supernet."""

    name = "anasod-reinforce"
    source = ANASOD

    arch_rate: float = option(0.05, "step of the logits", RATES)

    def domain(self, layout: SlotLayout) -> Domain:
        check_layout(layout)
        return Distributions(layout)
