"""Climbs over cells, or over distributions over operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fastnas.blackbox.domains import Domain, Point
from fastnas.blackbox.methods.base import BlackBox, Observation, OnDistributions
from fastnas.spaces.distribution import ANASOD


class Local(BlackBox):
    """Evaluates all neighbours, moves to the best of them while it is better, then starts anew.

    A neighbour of a cell has one operation (or one node's inputs) changed; of a distribution, one
    slot given to another operation. A climb waits for the evaluations around its centre; meanwhile
    further workers start climbs of their own.
    """

    name = "local"
    source = "White et al., UAI 2021, arXiv 2005.02960"

    def _propose(
        self, domain: Domain, past: Sequence[Observation], rng: np.random.Generator, count: int
    ) -> list[Observation]:
        found: list[Observation] = []
        seen = list(past)
        while len(found) < count:
            step = self._step(domain, seen, rng)
            found.append(step)
            seen.append(step)
        return found

    def _step(
        self, domain: Domain, past: Sequence[Observation], rng: np.random.Generator
    ) -> Observation:
        # Nothing is remembered between calls: a climb is read off the origins of the observations,
        # so a worker that resumes goes on with it.
        around: dict[Point, list[Observation]] = {}
        for one in past:
            if one.origin is not None:
                around.setdefault(one.origin, []).append(one)
        for start in past:
            if start.origin is None:
                step = self._climbed(domain, start, around, rng)
                if step is not None:
                    return step
        # Every climb is at its top or waits for evaluations, so another one starts.
        return Observation(domain.random(rng))

    def _climbed(
        self,
        domain: Domain,
        centre: Observation,
        around: Mapping[Point, Sequence[Observation]],
        rng: np.random.Generator,
    ) -> Observation | None:
        """Returns the next step of a climb; None where it is at its top, or waits."""
        while True:
            known = around.get(centre.point, ())
            tried = {one.point for one in known}
            left = [point for point in domain.neighbours(centre.point) if point not in tried]
            if left:
                return Observation(left[rng.integers(len(left))], origin=centre.point)
            # A neighbour that is not evaluated yet may be the best, so the climb waits for all of
            # them.
            if centre.value is None or not known or any(one.value is None for one in known):
                return None
            best = max(known, key=lambda one: one.value or 0.0)
            if not (best.value or 0.0) > centre.value:
                return None
            centre = best


class AnasodLocal(OnDistributions, Local):
    """Climbs over distributions, each judged by one of its cells (ANASOD-LS)."""

    name = "anasod-local"
    source = ANASOD
