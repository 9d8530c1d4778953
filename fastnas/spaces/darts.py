"""Describes the layout of DARTS: two inputs, and edges into every node from every state before.

Nodes 0 and 1 are the inputs (the outputs of the two cells before); each of the ``n`` intermediate
nodes j = 2 .. n+1 receives an edge from every node i < j, so there are
E = 2 + 3 + ... + (n+1) = n (n + 3) / 2 edges: 14 for the usual n = 4, (0, 2), (1, 2), (0, 3), ...
There is a normal and a reduction cell; a derived cell keeps two edges a node.

Sources: DARTS (Liu et al., 2019), quark0/darts ``cnn/genotypes.py``;
RobustDARTS (Zela et al., 2020), automl/RobustDARTS ``src/spaces.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import ceil, comb, isqrt
from typing import Any

from fastnas.checks import check_texts, check_type
from fastnas.spaces.darts_text import (
    from_darts,
    from_fields,
    to_darts,
    to_fairdarts,
    to_fields,
    to_ptdarts,
)
from fastnas.spaces.genotype import AnyGenotype, Edge, Genotype, Node
from fastnas.spaces.layout import CELL_NAMES, CELL_TYPES, CellType, DrawnCell, Layout
from fastnas.spaces.operations import OPS
from fastnas.spaces.slots import LENGTH, check_slots, check_wiring


@dataclass(frozen=True)
class DartsSlots:
    """Gives each node of DARTS two slots (the last of an odd length one), of distinct predecessors.

    Args:
        ops: that can stand in a slot, of both cell types; in DARTS' genotypes there is no "none".
        length: slots of a cell, 8 in DARTS.
    """

    ops: tuple[str, ...]
    length: int = 8
    cell_types: tuple[str, ...] = CELL_TYPES

    def __post_init__(self) -> None:
        check_texts("ops", self.ops)
        LENGTH.check("length", self.length)

    @property
    def nodes(self) -> int:
        return ceil(self.length / 2)

    @property
    def wirings(self) -> tuple[int, ...]:
        # Node j chooses 2 of its j + 2 predecessors: C(j + 2, 2) ways, or j + 2 for a single slot.
        return tuple(comb(node + 2, self._slots_of(node)) for node in range(self.nodes))

    def _slots_of(self, node: int) -> int:
        return min(2, self.length - 2 * node)

    def genotype(
        self, slots: Mapping[str, Sequence[str]], wiring: Mapping[str, Sequence[int]]
    ) -> Genotype:
        check_slots(self, slots)
        check_wiring(self, wiring)
        cells = {}
        for cell_type in self.cell_types:
            cell: list[tuple[Edge, ...]] = []
            for node, way in enumerate(wiring[cell_type]):
                own = slots[cell_type][2 * node : 2 * node + 2]
                # `way` is the number of the pair in lexicographic order: (0, 1), (0, 2), ...
                sources = list(combinations(range(node + 2), self._slots_of(node)))[way]
                cell.append(tuple(zip(own, sources)))
            cells[cell_type] = tuple(cell)
        # The output concatenates all intermediate nodes, as in every published cell.
        concat = tuple(range(2, self.nodes + 2))
        return Genotype(cells["normal"], concat, cells["reduce"], concat)

    def slots(self, genotype: AnyGenotype) -> dict[str, list[str]]:
        check_type("genotype", genotype, AnyGenotype)
        if not isinstance(genotype, Genotype):
            raise ValueError(
                f"the genotype is one of layout {genotype.layout}, not of the DARTS cells"
            )
        return {cell: [op for op, _, _ in genotype.edges(cell)] for cell in CELL_TYPES}


class DartsLayout(Layout[Genotype]):
    """Describes the cells of DARTS and of the spaces of RobustDARTS."""

    name = "darts"
    title = "DARTS"
    cell_types = CELL_TYPES
    inputs = 2
    operations = OPS
    is_closed = False
    edges_per_node = 2
    has_device_paths = True
    has_tables = False
    formats = {"darts": to_darts, "ptdarts": to_ptdarts, "fairdarts": to_fairdarts}
    search_defaults = {"layers": 8, "train_layers": 8}
    training_defaults = {
        "channels": 36, "layers": 20, "epochs": 600, "batch_size": 96, "lr": 0.025,
        "nesterov": False, "weight_decay": 3e-4, "cutout": 16,
        "drop_path": 0.2, "auxiliary": True, "auxiliary_weight": 0.4,
    }  # fmt: skip
    """Section 3.2."""

    def nodes_of(self, edges: int, where: str) -> int:
        # This is the positive root of n (n + 3) / 2 = E, in whole numbers; 14 edges make n = 4.
        nodes = (isqrt(9 + 8 * edges) - 3) // 2
        if nodes < 1 or nodes * (nodes + 3) // 2 != edges:
            raise ValueError(
                f"{where}: {edges} edges make no whole number of nodes; "
                "n intermediate nodes have n (n + 3) / 2 edges: 2, 5, 9, 14, 20, ..."
            )
        return nodes

    def slots(self, ops: Sequence[str], length: int | None = None) -> DartsSlots:
        # DARTS leaves `none` out when it derives a cell, so no slot can hold it.
        return DartsSlots(
            tuple(op for op in ops if op != "none"), DartsSlots.length if length is None else length
        )

    def genotype(self, cells: Mapping[CellType, Sequence[Node]]) -> Genotype:
        concat = tuple(range(2, len(cells["normal"]) + 2))
        return Genotype(tuple(cells["normal"]), concat, tuple(cells["reduce"]), concat)

    def cells(self, genotype: Genotype) -> dict[CellType, tuple[Node, ...]]:
        return {cell_type: genotype.nodes(cell_type) for cell_type in CELL_TYPES}

    def is_connected(self, genotype: Genotype, cell_type: CellType) -> bool:
        return bool(genotype.live_nodes(cell_type))

    def begins(self, text: str) -> bool:
        # Named tuple text has no beginning of its own, so it takes what no other layout does.
        return True

    def read(self, text: str) -> Genotype:
        return from_darts(text)

    def text(self, genotype: Genotype) -> str:
        try:
            # Flat pairs can only say two edges a node; other cells are written as a JSON line.
            return to_darts(genotype)
        except ValueError:
            return self.line(genotype)

    def line(self, genotype: Genotype) -> str:
        return json.dumps(to_fields(genotype))

    def to_value(self, genotype: Genotype) -> dict[str, Any]:
        return to_fields(genotype)

    def from_value(self, value: Mapping[str, Any]) -> Genotype | None:
        return from_fields(value)

    def drawn_cells(self, genotype: Genotype) -> list[DrawnCell]:
        return [_drawn(genotype, cell_type) for cell_type in CELL_TYPES]


def _drawn(genotype: Genotype, cell_type: CellType) -> DrawnCell:
    count = len(genotype.nodes(cell_type))
    live = set(genotype.live_nodes(cell_type))
    output = count + 2
    names = ["$c_{k-2}$", "$c_{k-1}$", *map(str, range(count)), "$c_k$"]
    edges: list[tuple[int, int, str | None]] = [
        (source, node, op) for op, node, source in genotype.edges(cell_type)
    ]
    # A node without a state is not concatenated, and is drawn as dead.
    edges += [(node, output, None) for node in genotype.concat(cell_type) if node in live]
    return DrawnCell(CELL_NAMES[cell_type], 2, names, edges, set(range(2, output)) - live)


DARTS = DartsLayout()
