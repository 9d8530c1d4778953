"""Describes distributions over operations, and the cells that have them (ANASOD).

A cell of length N has N slots for operations. Its operation distribution says which share of the
slots each operation has, and nothing of where they are: p = counts / N, a point of the simplex.
A distribution stands for all cells with its counts, and, snapped to another N, for shorter and
longer ones (Wan et al., Approximate Neural Architecture Search via Operation Distribution
Learning, WACV 2022). The encoding, the snapping and the two cells are those of the first author's
later public code; other lengths are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from fastnas.checks import check_int, check_number, check_texts, check_type, short
from fastnas.spaces.genotype import AnyGenotype
from fastnas.spaces.slots import LENGTH, SlotLayout, check_layout
from fastnas.spaces.space import Space

ANASOD = "Wan et al., WACV 2022, arXiv 2111.04670; reconstructed"
"""Source of the methods that search distributions."""

Counts = tuple[int, ...]
"""How many slots each operation has."""

SUM_TOLERANCE = 1e-6
ROUNDING = 1e-9
"""By which a share that is a whole number of slots may miss it."""


def slots_of(space: Space, length: int | None = None) -> SlotLayout:
    """Returns the slots of the cells that a space derives, without `none` if they never have it.

    Args:
        length: of the cells; None: as the space has them, 6 in NAS-Bench-201, else 8 for 4 nodes.

    Raises:
        ValueError: the space offers other candidates on other edges, or has one length.
    """
    check_type("space", space, Space)
    if length is not None:
        LENGTH.check("length", length)
    # Each element is the candidates of an edge: one distribution needs the same on all of them.
    offered = set(space.normal + space.reduce)
    if len(offered) > 1:
        raise ValueError(
            f"space {space.name} offers other candidates on other edges; a distribution over"
            " operations needs the same on all, as S0, S2, S3, S4 and nb201 have"
        )
    return space.cell_layout.slots(offered.pop(), space.kept_edges if length is None else length)


@dataclass(frozen=True)
class OperationDistribution:
    """Holds a point of the simplex for each cell type.

    Args:
        ops: K operation names.
        p: cell type to K shares, each >= 0, that sum to 1.

    Raises:
        ValueError: they do not, or there are more or fewer than K, or one is NaN.
    """

    ops: tuple[str, ...]
    p: Mapping[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        check_texts("ops", self.ops)
        check_type("p", self.p, Mapping)
        if not self.p:
            raise ValueError("p is empty; shares of one or more cell types are needed")
        checked = {}
        for cell_type, given in self.p.items():
            where = f"distribution of the {cell_type} cell"
            if not isinstance(given, list | tuple):
                raise TypeError(f"{where} is {short(given)}; a list or tuple of shares is needed")
            for op, share in zip(self.ops, given):
                check_number(f"{where}: {op}", share)
            shares = tuple(float(share) for share in given)
            if len(shares) != len(self.ops):
                raise ValueError(
                    f"{where}: {len(shares)} shares are given for {len(self.ops)} operations:"
                    f" {', '.join(self.ops)}"
                )
            for op, share in zip(self.ops, shares):
                if not 0 <= share <= 1 + SUM_TOLERANCE:
                    raise ValueError(f"{where}: {op} has {share}; 0 to 1 is allowed")
            # Shares may come from float32 or from text, hence a tolerance; `snap` normalises them.
            if abs(sum(shares) - 1) > SUM_TOLERANCE:
                raise ValueError(f"{where}: the shares sum to {sum(shares):.9g}; 1 is needed")
            checked[cell_type] = shares
        object.__setattr__(self, "p", checked)

    @classmethod
    def of(cls, genotype: AnyGenotype, layout: SlotLayout) -> OperationDistribution:
        """Returns the distribution that a cell has.

        Raises:
            ValueError: an operation is not of the layout.
        """
        check_layout(layout)
        p = {}
        for cell_type, slots in layout.slots(genotype).items():
            unknown = sorted(set(slots) - set(layout.ops))
            if unknown:
                raise ValueError(
                    f"the {cell_type} cell has {', '.join(unknown)}; the operations are"
                    f" {', '.join(layout.ops)}"
                )
            # p = counts / N, the encoding of ANASOD.
            p[cell_type] = tuple(slots.count(op) / len(slots) for op in layout.ops)
        return cls(layout.ops, p)

    @classmethod
    def from_counts(cls, counts: Mapping[str, Counts], layout: SlotLayout) -> OperationDistribution:
        """Returns the distribution of cells with these counts, each >= 0 and some above 0.

        Raises:
            TypeError, ValueError: they are not, or there are more or fewer than operations.
        """
        check_layout(layout)
        check_type("counts", counts, Mapping)
        for cell, row in counts.items():
            if not isinstance(row, list | tuple) or len(row) != len(layout.ops):
                raise ValueError(f"counts of the {cell} cell are {short(row)}; a number for each"
                                 f" of {', '.join(layout.ops)} is needed")  # fmt: skip
            for c in row:
                check_int(f"counts of the {cell} cell: one", c, 0)
            if not sum(row):
                raise ValueError(
                    f"counts of the {cell} cell are {short(row)}; one above 0 is needed"
                )
        if not counts:
            raise ValueError("counts is empty; those of one or more cell types are needed")
        p = {cell: tuple(c / sum(row) for c in row) for cell, row in counts.items()}
        return cls(layout.ops, p)

    @classmethod
    def dirichlet(
        cls,
        layout: SlotLayout,
        rng: np.random.Generator,
        concentration: float | Sequence[float] = 1.0,
    ) -> OperationDistribution:
        """Draws from Dirichlet(concentration), for each cell type independently.

        Raises:
            ValueError: a concentration is not above 0, or there are not as many as operations.
        """
        check_layout(layout)
        check_type("rng", rng, np.random.Generator)
        given = concentration if isinstance(concentration, list | tuple) else [concentration]
        for one in given:
            check_number("concentration", one)
        if len(given) not in (1, len(layout.ops)) or min(given) <= 0:
            raise ValueError(
                f"concentration is {short(concentration)}; one above 0, or one for each of the"
                f" {len(layout.ops)} operations, is needed"
            )
        # One concentration stands for all K operations.
        prior = np.broadcast_to(np.asarray(given, float), (len(layout.ops),))
        p = {cell: tuple(map(float, rng.dirichlet(prior))) for cell in layout.cell_types}
        return cls(layout.ops, p)

    @classmethod
    def from_dict(cls, shares: Mapping[str, Mapping[str, float]]) -> OperationDistribution:
        """Reads a mapping of cell type to operation to share, as `as_dict` gives it.

        Raises:
            ValueError: they are not, or are no distribution.
        """
        try:
            # The order of the operations is that of the rows, which has to be one.
            (ops,) = {tuple(row) for row in shares.values()}
            return cls(ops, {cell: tuple(row.values()) for cell, row in shares.items()})
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"shares are {short(shares)}, no distribution: {error}") from error

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Maps each cell type to operations, and those to shares."""
        return {cell: dict(zip(self.ops, shares)) for cell, shares in self.p.items()}

    def counts(self, length: int) -> dict[str, Counts]:
        """Maps each cell type to the counts of cells of that length (`snap`)."""
        return {cell_type: snap(shares, length) for cell_type, shares in self.p.items()}

    def sample(self, layout: SlotLayout, rng: np.random.Generator) -> AnyGenotype:
        """Draws a cell whose counts are exactly `counts(layout.length)`, uniform over all such.

        Raises:
            ValueError: the layout is one of other operations or cell types.
        """
        check_layout(layout)
        check_type("rng", rng, np.random.Generator)
        if layout.ops != self.ops or set(layout.cell_types) != set(self.p):
            raise ValueError(
                f"a distribution over {', '.join(self.ops)} ({', '.join(self.p)}) is none of cells"
                f" of {', '.join(layout.ops)} ({', '.join(layout.cell_types)})"
            )
        slots, wiring = {}, {}
        for cell_type, counts in self.counts(layout.length).items():
            ops = np.repeat(np.arange(len(self.ops)), counts)
            # Counts are exact; only places are drawn, all orders of the slots alike, then the
            # wiring.
            slots[cell_type] = [self.ops[i] for i in rng.permutation(ops)]
            wiring[cell_type] = [int(rng.integers(ways)) for ways in layout.wirings]
        return layout.genotype(slots, wiring)


def snap(p: Sequence[float], length: int) -> Counts:
    """Returns the counts nearest to length p: largest remainders, of equal ones the first.

    The counts are non-negative and sum to `length`.
    """
    check_int("length", length, 1)
    if not isinstance(p, list | tuple | np.ndarray) or not len(p):
        raise TypeError(f"p is {short(p)}; a list, a tuple or an array of shares is needed")
    for share in p:
        check_number("p: a share", share)
    if min(p) < 0 or not max(p):
        raise ValueError(f"p is {short(p)}; shares >= 0 are needed, one of them above 0")
    shares = np.asarray(p, float)
    # N p are real numbers, of which floors and the largest remainders make whole ones.
    slots = length * shares / shares.sum()
    # N p may come out as 2.9999999 where 3 slots are meant, whose floor would lose one.
    counts = np.floor(slots + ROUNDING).astype(int)
    left = length - int(counts.sum())
    # Remainders are rounded, so that those which should be equal are; the stable sort then takes
    # the first operations.
    first = np.argsort(-np.round(slots - counts, 9), kind="stable")[:left]
    counts[first] += 1
    return tuple(map(int, counts))


def lattice_size(operations: int, length: int) -> int:
    """Counts the distributions that cells of that length have: C(length + K - 1, K - 1)."""
    check_int("operations", operations, 1)
    check_int("length", length, 0)
    return comb(length + operations - 1, operations - 1)


def lattice(operations: int, length: int) -> Iterator[Counts]:
    """Yields all counts of `length` slots over K operations, largest first, lexicographically."""
    check_int("operations", operations, 1)
    check_int("length", length, 0)
    return _lattice(operations, length)


def _lattice(operations: int, length: int) -> Iterator[Counts]:
    if operations == 1:
        yield (length,)
        return
    for first in range(length, -1, -1):
        for rest in _lattice(operations - 1, length - first):
            yield (first, *rest)
