"""Defines what a black-box method answers a study: what to evaluate next, without gradients.

Each searches the distributions over operations ("anasod-...") or, as its plain twin, the cells.
The paper's own loops could not be read; what is here beyond the encoding is our reconstruction
from its abstract and the first author's later code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fastnas.blackbox.domains import Cells, Distributions, Domain, Point
from fastnas.bounds import Bounds
from fastnas.checks import check_int, check_type
from fastnas.options import Optioned, option
from fastnas.spaces.slots import SlotLayout, check_layout


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


class BlackBox(Optioned):
    """Proposes as a function of what was observed and of the generator alone.

    So several workers can share a study, and one that resumes it goes on as if it had not stopped.

    A method is one file of `fastnas.blackbox.methods` with a subclass: its `name`, its `source`,
    and its options as fields (`fastnas.options.option`).
    """

    what = "method"
    table: ClassVar[dict[str, type[BlackBox]]] = {}
    source: ClassVar[str]
    """Paper and arXiv number."""

    def domain(self, layout: SlotLayout) -> Domain:
        """Returns what is searched: the cells of a layout."""
        check_layout(layout)
        return Cells(layout)

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


class OnDistributions(BlackBox):
    """Searches the distributions over operations in place of the cells."""

    concentration: float = option(1.0, "of the Dirichlet prior", Bounds(0, 1e6, above=True))

    def domain(self, layout: SlotLayout) -> Domain:
        check_layout(layout)
        return Distributions(layout, self.concentration)
