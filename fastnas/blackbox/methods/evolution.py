"""Evolves cells (regularised evolution)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastnas.blackbox.domains import Domain
from fastnas.blackbox.methods.base import BlackBox, Observation
from fastnas.bounds import whole
from fastnas.options import option


class Evolution(BlackBox):
    """Mutates the best of a random sample of the population; the child replaces the oldest.

    10 cells and samples of 3 are what the authors of NAS-Bench-201 ran it with there.
    """

    name = "evolution"
    source = "Real et al., AAAI 2019, arXiv 1802.01548"

    population: int = option(10, "cells alive", whole(1, 10**6))
    sample: int = option(3, "of which the best has a child", whole(1, 10**6))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample > self.population:
            raise ValueError(
                f"sample is {self.sample}; 1 to population, {self.population}, is allowed"
            )

    def _propose(
        self, domain: Domain, past: Sequence[Observation], rng: np.random.Generator, count: int
    ) -> list[Observation]:
        # They are in the order of proposals, so the oldest fall out first: this is the paper's
        # ageing.
        alive = [one for one in past if one.value is not None][-self.population :]
        missing = max(0, self.population - len(past))
        found = [Observation(domain.random(rng)) for _ in range(min(count, missing))]
        while len(found) < count:
            if not alive:  # all of the first population is being evaluated
                found.append(Observation(domain.random(rng)))
                continue
            chosen = rng.choice(len(alive), min(self.sample, len(alive)), replace=False)
            parent = max((alive[i] for i in chosen), key=lambda one: one.value or 0.0)
            children = domain.neighbours(parent.point)
            found.append(Observation(children[rng.integers(len(children))], origin=parent.point))
        return found
