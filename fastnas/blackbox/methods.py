"""Proposes what to evaluate next from what was evaluated, without gradients.

Each searches the distributions over operations ("anasod-...") or, as its plain twin, the cells.
The paper's own loops could not be read; what is here beyond the encoding is our reconstruction
from its abstract and the first author's later code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fastnas.blackbox.domains import Cells, Distributions, Domain, Point
from fastnas.bounds import Bounds, whole
from fastnas.checks import check_int, check_type
from fastnas.spaces.distribution import ANASOD, SlotLayout, check_layout
from fastnas.strategies.method import Method


@dataclass(frozen=True)
class Observation:
    """Records a point that was proposed.

    Attributes:
        point: of the domain.
        value: accuracy, 0 to 1, of its cell or of one drawn from it; None while it is evaluated.
        origin: the point from which it was a step, None where it was drawn afresh.
    """

    point: Point
    value: float | None = None
    origin: Point | None = None


class BlackBox(Method):
    """Proposes as a function of what was observed and of the generator alone.

    So several workers can share a study, and one that resumes it goes on as if it had not stopped.
    """

    on_distributions: ClassVar[bool] = False

    bounds = {"concentration": Bounds(0, 1e6, above=True)}
    concentration: float = 1.0

    def domain(self, layout: SlotLayout) -> Domain:
        """Returns what is searched."""
        check_layout(layout)
        return Distributions(layout, self.concentration) if self.on_distributions else Cells(layout)

    def propose(
        self, domain: Domain, past: Sequence[Observation], rng: np.random.Generator, count: int = 1
    ) -> list[Observation]:
        """Returns the next points, to be evaluated together.

        Args:
            past: in the order of their proposals, those that are being evaluated included.
            count: how many, at least one.

        Raises:
            TypeError, ValueError: an argument is of another type, or count below 1.
        """
        check_type("domain", domain, Domain)
        check_type("past", past, list, tuple)
        for i, one in enumerate(past):
            check_type(f"past[{i}]", one, Observation)
        check_type("rng", rng, np.random.Generator)
        check_int("count", count, 1)
        return self._propose(domain, past, rng, count)

    def _propose(
        self, domain: Domain, past: Sequence[Observation], rng: np.random.Generator, count: int
    ) -> list[Observation]:
        """Returns what `propose` does, for arguments that are checked."""
        raise NotImplementedError


class Random(BlackBox):
    """Draws independent points: uniform cells, or Dirichlet distributions (ANASOD-RS)."""

    name = "random"
    source = "Li and Talwalkar, UAI 2019, arXiv 1902.07638"

    def _propose(
        self, domain: Domain, past: Sequence[Observation], rng: np.random.Generator, count: int
    ) -> list[Observation]:
        return [Observation(domain.random(rng)) for _ in range(count)]


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
        around: dict[Point, list[Observation]] = {}
        for one in past:
            if one.origin is not None:
                around.setdefault(one.origin, []).append(one)
        for start in past:
            if start.origin is None:
                step = self._climbed(domain, start, around, rng)
                if step is not None:
                    return step
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
            if centre.value is None or not known or any(one.value is None for one in known):
                return None
            best = max(known, key=lambda one: one.value or 0.0)
            if not (best.value or 0.0) > centre.value:
                return None
            centre = best


class Evolution(BlackBox):
    """Evolves a population: the best of a random sample has a mutated child,
    which takes the place of the oldest.

    Options:
        population, sample: 10 and 3, as the authors of NAS-Bench-201 ran it there.
    """

    name = "evolution"
    source = "Real et al., AAAI 2019, arXiv 1802.01548"
    options = {"population": 10, "sample": 3}
    bounds = {"population": whole(1, 10**6), "sample": whole(1, 10**6)}

    population: int
    sample: int

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.sample > self.population:
            raise ValueError(
                f"sample is {self.sample}; 1 to population, {self.population}, is allowed"
            )

    def _propose(
        self, domain: Domain, past: Sequence[Observation], rng: np.random.Generator, count: int
    ) -> list[Observation]:
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


class AnasodRandom(Random):
    """Draws a Dirichlet distribution and one cell of it: ANASOD-RS."""

    name = "anasod-random"
    source = ANASOD
    options = {"concentration": 1.0}
    on_distributions = True


class AnasodLocal(Local):
    """Climbs over distributions, each judged by one of its cells: ANASOD-LS."""

    name = "anasod-local"
    source = ANASOD
    options = {"concentration": 1.0}
    on_distributions = True
