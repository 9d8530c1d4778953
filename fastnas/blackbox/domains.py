"""Defines what a black-box method searches: distributions over operations, or the cells themselves.

A point is a tuple of whole numbers, each below its size; a method asks for random points,
neighbours and features, and does not know which domain it is in.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from itertools import product
from math import prod
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fastnas.spaces import AnyGenotype
from fastnas.spaces.distribution import OperationDistribution, lattice, lattice_size
from fastnas.spaces.slots import SlotLayout

Point = tuple[int, ...]
MOST_LISTED = 5_000
"""Points, up to which a domain is searched whole: the 210 distributions of NAS-Bench-201, not its
15,625 cells, where the acquisition would take longer than the fit."""
DRAWS = 20
"""Of cells of a distribution, for one that was not evaluated: again, one would tell nothing new."""


@runtime_checkable
class Domain(Protocol):
    """Holds points, and says which cells they stand for."""

    layout: SlotLayout
    is_noisy: bool
    """Whether a point stands for several cells, so that it is worth a second evaluation."""
    is_categorical: bool
    """Whether features are codes, alike or not, rather than quantities."""
    sizes: dict[str, int]
    """Name of each coordinate to how many values it has, in the order of a point."""
    choices: list[tuple[int, int]]
    """(K, n) of each choice that a point makes: n draws among K."""

    def random(self, rng: np.random.Generator) -> Point: ...

    def neighbours(self, point: Point) -> list[Point]:
        """Lists all points one step away, in a fixed order."""

    def features(self, points: Sequence[Point]) -> NDArray[np.float64]:
        """Returns the points as numbers, [n, D]."""

    def tallies(self, point: Point) -> NDArray[np.int64]:
        """Counts how often each choice drew each of its K, [choices, largest K]."""

    def from_tallies(self, tallies: Sequence[NDArray[np.int64]]) -> Point:
        """Inverts `tallies`: a point from a row [K] for each choice."""

    def everything(self) -> list[Point] | None:
        """Lists all points; None where they are more than `MOST_LISTED`."""

    def cell(self, point: Point, rng: np.random.Generator) -> AnyGenotype:
        """Returns the cell of a point, or one drawn from its distribution."""


def unseen_cell(
    domain: Domain, point: Point, rng: np.random.Generator, seen: Container[AnyGenotype]
) -> AnyGenotype:
    """Returns `domain.cell`, if `DRAWS` draws of a distribution have one that was not seen."""
    cell = domain.cell(point, rng)
    for _ in range(DRAWS - 1 if domain.is_noisy else 0):
        if cell not in seen:
            break
        cell = domain.cell(point, rng)
    return cell


class Distributions:
    """Holds the counts of operations of each cell type, as they are snapped for a length.

    Args:
        layout: of the cells that are drawn and evaluated.
        concentration: of the Dirichlet prior.
    """

    is_noisy = True
    is_categorical = False

    def __init__(self, layout: SlotLayout, concentration: float = 1.0) -> None:
        self.layout, self.concentration = layout, concentration
        self.sizes = {
            f"{cell}.{op}": layout.length + 1 for cell in layout.cell_types for op in layout.ops
        }
        self.choices = [(len(layout.ops), layout.length)] * len(layout.cell_types)

    def random(self, rng: np.random.Generator) -> Point:
        drawn = OperationDistribution.dirichlet(self.layout, rng, self.concentration)
        return self.point(drawn)

    def point(self, distribution: OperationDistribution) -> Point:
        """Returns the snapped distribution."""
        counts = distribution.counts(self.layout.length)
        return tuple(c for cell in self.layout.cell_types for c in counts[cell])

    def distribution(self, point: Point) -> OperationDistribution:
        rows = dict(zip(self.layout.cell_types, self._rows(point)))
        return OperationDistribution.from_counts(rows, self.layout)

    def neighbours(self, point: Point) -> list[Point]:
        """Gives one slot from an operation to another of the same cell type."""
        found = []
        K = len(self.layout.ops)
        for start in range(0, len(point), K):
            for a, b in product(range(start, start + K), repeat=2):
                if a != b and point[a]:
                    moved = list(point)
                    moved[a] -= 1
                    moved[b] += 1
                    found.append(tuple(moved))
        return found

    def features(self, points: Sequence[Point]) -> NDArray[np.float64]:
        """Returns p, of one cell type after the other."""
        return np.asarray(points, float).reshape(len(points), -1) / self.layout.length

    def tallies(self, point: Point) -> NDArray[np.int64]:
        return np.asarray(self._rows(point))

    def from_tallies(self, tallies: Sequence[NDArray[np.int64]]) -> Point:
        return tuple(int(count) for row in tallies for count in row)

    def everything(self) -> list[Point] | None:
        types, K = len(self.layout.cell_types), len(self.layout.ops)
        if lattice_size(K, self.layout.length) ** types > MOST_LISTED:
            return None
        rows = list(lattice(K, self.layout.length))
        return [tuple(c for row in some for c in row) for some in product(rows, repeat=types)]

    def cell(self, point: Point, rng: np.random.Generator) -> AnyGenotype:
        return self.distribution(point).sample(self.layout, rng)

    def _rows(self, point: Point) -> list[tuple[int, ...]]:
        K = len(self.layout.ops)
        return [point[i : i + K] for i in range(0, len(point), K)]


class Cells:
    """Holds the operation of every slot and the wiring of every node."""

    is_noisy = False
    is_categorical = True

    def __init__(self, layout: SlotLayout) -> None:
        self.layout = layout
        slots = {f"slot{i}": len(layout.ops) for i in range(layout.length)}
        # A node that can be wired in one way only is no coordinate: it would add points that are
        # the same cell.
        nodes = {f"node{i}": ways for i, ways in enumerate(layout.wirings) if ways > 1}
        self.sizes = {
            f"{cell}.{name}": size
            for cell in layout.cell_types
            for name, size in (slots | nodes).items()
        }
        self.choices = [(size, 1) for size in self.sizes.values()]

    def random(self, rng: np.random.Generator) -> Point:
        return tuple(int(rng.integers(size)) for size in self.sizes.values())

    def neighbours(self, point: Point) -> list[Point]:
        """Puts another operation in one slot, or wires one node in another way."""
        return [
            (*point[:i], value, *point[i + 1 :])
            for i, size in enumerate(self.sizes.values())
            for value in range(size)
            if value != point[i]
        ]

    def features(self, points: Sequence[Point]) -> NDArray[np.float64]:
        """Returns the points themselves."""
        return np.asarray(points, float).reshape(len(points), -1)

    def tallies(self, point: Point) -> NDArray[np.int64]:
        # Each choice draws once, so its tally is a row of the identity.
        return np.eye(max(self.sizes.values()), dtype=np.int64)[list(point)]

    def from_tallies(self, tallies: Sequence[NDArray[np.int64]]) -> Point:
        return tuple(int(row.argmax()) for row in tallies)

    def everything(self) -> list[Point] | None:
        if prod(self.sizes.values()) > MOST_LISTED:
            return None
        return list(product(*map(range, self.sizes.values())))

    def cell(self, point: Point, rng: np.random.Generator | None = None) -> AnyGenotype:
        layout = self.layout
        values = iter(point)
        slots, wiring = {}, {}
        for cell_type in layout.cell_types:
            slots[cell_type] = [layout.ops[next(values)] for _ in range(layout.length)]
            wiring[cell_type] = [next(values) if ways > 1 else 0 for ways in layout.wirings]
        return layout.genotype(slots, wiring)
