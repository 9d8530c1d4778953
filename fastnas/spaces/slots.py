"""Says how the cells of a layout are made of operations in slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from fastnas.bounds import whole
from fastnas.checks import check_int, check_type, short
from fastnas.spaces.genotype import AnyGenotype

LENGTH = whole(1, 128)
"""Slots of a cell; a cell of DARTS has 8, and 2 in each of its nodes."""


@runtime_checkable
class SlotLayout(Protocol):
    """Says how cells are made of operations in slots."""

    @property
    def ops(self) -> tuple[str, ...]:
        """Lists what can stand in a slot."""

    @property
    def cell_types(self) -> tuple[str, ...]:
        """Lists the cell types of an architecture."""

    @property
    def length(self) -> int:
        """Counts the slots of a cell."""

    @property
    def wirings(self) -> tuple[int, ...]:
        """Counts the ways in which each node of a cell can choose the nodes that its slots read."""

    def genotype(
        self, slots: Mapping[str, Sequence[str]], wiring: Mapping[str, Sequence[int]]
    ) -> AnyGenotype:
        """Makes the cells with these operations in their slots and, of each node, that wiring."""

    def slots(self, genotype: AnyGenotype) -> dict[str, list[str]]:
        """Maps each cell type to its operations, slot by slot; ValueError for other cells."""


def check_layout(layout: object) -> None:
    """Raises TypeError unless `layout` says how cells are made of slots."""
    check_type("layout", layout, SlotLayout)


def check_slots(layout: SlotLayout, slots: Mapping[str, Sequence[str]]) -> None:
    """Raises ValueError unless every cell type has one of the operations in each slot."""
    check_type("slots", slots, Mapping)
    for cell_type in layout.cell_types:
        given = slots.get(cell_type)
        if not isinstance(given, list | tuple) or len(given) != layout.length:
            needed = f"a list of {layout.length} operations is needed"
        elif any(op not in layout.ops for op in given):
            needed = f"the operations are {', '.join(layout.ops)}"
        else:
            continue
        raise ValueError(f"slots of the {cell_type} cell are {short(given)}; {needed}")


def check_wiring(layout: SlotLayout, wiring: Mapping[str, Sequence[int]]) -> None:
    """Raises ValueError unless every node has a number of one of its wirings."""
    check_type("wiring", wiring, Mapping)
    for cell_type in layout.cell_types:
        given, ways = wiring.get(cell_type), layout.wirings
        where = f"wiring of the {cell_type} cell"
        if not isinstance(given, list | tuple) or len(given) != len(ways):
            raise ValueError(f"{where} is {short(given)}; a list of {len(ways)} numbers is needed")
        for node, (way, count) in enumerate(zip(given, ways)):
            # A wiring is the number of a choice, below the ways that there are of it.
            check_int(f"{where}, node {node},", way, 0, count - 1)
