"""Draws cells, or distributions over operations, at random."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastnas.blackbox.domains import Domain
from fastnas.blackbox.methods.base import BlackBox, Observation, OnDistributions
from fastnas.spaces.distribution import ANASOD


class Random(BlackBox):
    """Proposes independent points: uniform cells, or Dirichlet distributions (ANASOD-RS)."""

    name = "random"
    source = "Li and Talwalkar, UAI 2019, arXiv 1902.07638"

    def _propose(
        self, domain: Domain, past: Sequence[Observation], rng: np.random.Generator, count: int
    ) -> list[Observation]:
        return [Observation(domain.random(rng)) for _ in range(count)]


class AnasodRandom(OnDistributions, Random):
    """Draws a Dirichlet distribution and one cell of it (ANASOD-RS)."""

    name = "anasod-random"
    source = ANASOD
