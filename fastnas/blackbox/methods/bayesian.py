"""Optimises cells, or distributions over operations, with a Gaussian process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastnas.blackbox.domains import Domain, Point
from fastnas.blackbox.methods.base import BlackBox, Observation, OnDistributions
from fastnas.bounds import whole
from fastnas.extras import require
from fastnas.options import option
from fastnas.spaces.distribution import ANASOD

POOL, TOPS = 1000, 5
"""Random points, and best observed ones whose neighbours join them, where not all are listed."""


class Bayesian(BlackBox):
    """Proposes the points of the largest expected improvement under a Gaussian process.

    Its target is -log(error), standardised; its kernel Matern-5/2 of distributions, of cells that
    of the Hamming distance, with a length scale for each feature; its noise is learned, and of
    distributions takes up what wiring changes. The incumbent is the largest posterior mean at an
    observed point, for a lucky cell is no proof of its distribution. Points of a batch, and those
    that are being evaluated, count as if their posterior mean had been observed.
    """

    name = "bo"
    source = "log expected improvement: Ament et al., NeurIPS 2023, arXiv 2310.20708"

    initial: int = option(10, "random points before the first fit", whole(2, 10**5))

    def __post_init__(self) -> None:
        super().__post_init__()
        # BoTorch belongs to an extra, so only this method asks for it.
        require("botorch")
        from fastnas.blackbox.gaussian_process import Process

        self._process = Process

    def _propose(
        self, domain: Domain, past: Sequence[Observation], rng: np.random.Generator, count: int
    ) -> list[Observation]:
        known = [(one.point, one.value) for one in past if one.value is not None]
        # Points that are being evaluated count too, or several workers would each draw the initial
        # ones.
        first = max(0, self.initial - len(past))
        found = [Observation(domain.random(rng)) for _ in range(min(count, first))]
        if len(found) == count:
            return found
        if len(known) < 2:  # the first points are all being evaluated
            return [*found, *(Observation(domain.random(rng)) for _ in range(count - len(found)))]
        pending = [one.point for one in past if one.value is None]
        pending += [one.point for one in found]
        # Pending points are asked for as well, because `believe` needs their index among the
        # candidates.
        asked = list(dict.fromkeys([*self._candidates(domain, known, rng), *pending]))
        index = {point: i for i, point in enumerate(asked)}
        process = self._process(
            domain.features([point for point, _ in known]),
            [float(value) for _, value in known if value is not None],
            domain.features(asked),
            categorical=domain.is_categorical,
        )
        for point in pending:
            process.believe(index[point])
        # A cell has one accuracy, so it is asked for once; a distribution is worth another of its
        # cells.
        taken = set() if domain.is_noisy else {index[o.point] for o in past if o.point in index}
        while len(found) < count:
            scores = process.log_improvement()
            # Where every point is taken, all scores would be -inf and the choice a random one.
            if len(taken) < len(asked):
                scores[list(taken)] = -torch.inf
            best = _argmax(scores, rng)
            found.append(Observation(asked[best]))
            if not domain.is_noisy:
                taken.add(best)
            # The next point of a batch must not be the neighbour that promises the same.
            process.believe(best)
        return found

    def _candidates(
        self, domain: Domain, known: Sequence[tuple[Point, float | None]], rng: np.random.Generator
    ) -> list[Point]:
        listed = domain.everything()
        if listed is not None:
            return listed
        tops = sorted(known, key=lambda pair: -(pair[1] or 0.0))[:TOPS]
        near = [near for point, _ in tops for near in [point, *domain.neighbours(point)]]
        drawn = [domain.random(rng) for _ in range(POOL)]
        return list(dict.fromkeys([*near, *drawn]))


def _argmax(values: Tensor, rng: np.random.Generator) -> int:
    """Returns the index of the largest value; of equal ones a random one."""
    # A random one is taken, as the first would follow the order in which candidates are listed.
    best = torch.nonzero(values == values.max()).flatten()
    return int(best[rng.integers(len(best))])


class AnasodBayesian(OnDistributions, Bayesian):
    """Optimises on the simplex of distributions (ANASOD-BO)."""

    name = "anasod-bo"
    source = ANASOD
