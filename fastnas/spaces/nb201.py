"""Describes the layout of NAS-Bench-201: 4 nodes, an operation on each of the 6 edges between.

Node 0 is the input, nodes 1, 2, 3 receive an edge from every node before them, the last is the
output: edges (0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3). There is only the normal cell
(residual blocks stand for the reduction cells); a derived cell keeps all edges, some as ``none``.

Source: NAS-Bench-201 (Dong & Yang, ICLR 2020), D-X-Y/AutoDL-Projects.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastnas.checks import check_texts, check_type
from fastnas.spaces.genotype import AnyGenotype, Node, as_sequence, checked_edge
from fastnas.spaces.layout import CellType, DrawnCell, Layout
from fastnas.spaces.slots import LENGTH, check_slots
from fastnas.spaces.text import check_kind, check_text, quoted

NB201_OPS: tuple[str, ...] = (
    "none",
    "skip_connect",
    "nor_conv_1x1",
    "nor_conv_3x3",
    "avg_pool_3x3",
)
"""The five operations of NAS-Bench-201, in the order of its public code."""

EDGES = 6


@dataclass(frozen=True)
class NB201Genotype(AnyGenotype):
    """Holds a NAS-Bench-201 cell: 4 nodes, an operation on each of the 6 edges between them.

    ``nodes[k]`` holds the edges into node k + 1, one from each node before it, in order.

    Raises:
        ValueError: other nodes or edges than those, or an operation not in :data:`NB201_OPS`.
    """

    layout = "nb201"

    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        given = as_sequence(self.nodes, "cell")
        if len(given) != 3:
            raise ValueError(f"cell: expected the edges into 3 nodes, got {len(given)}")
        nodes = []
        for node, edges in enumerate(given, 1):
            where = f"node {node}"
            checked = tuple(checked_edge(edge, node, where) for edge in as_sequence(edges, where))
            sources = [source for _, source in checked]
            # The published names list predecessors in this order, and a table is looked up by name.
            if sources != list(range(node)):
                raise ValueError(
                    f"{where}: expected one edge from each of the nodes {list(range(node))} "
                    f"in that order, got edges from {sources}"
                )
            for op, source in checked:
                if op not in NB201_OPS:
                    raise ValueError(
                        f"{where}: operation {op!r} from node {source} is not one of "
                        f"{', '.join(NB201_OPS)}"
                    )
            nodes.append(checked)
        object.__setattr__(self, "nodes", tuple(nodes))

    def edges(self, cell: CellType = "normal") -> tuple[tuple[str, int, int], ...]:
        """Lists (operation, node, predecessor), node-major; there is only a normal cell."""
        if cell != "normal":
            raise ValueError(f"cell is {cell!r}; a NAS-Bench-201 cell is a 'normal' cell")
        return tuple(
            (op, node, source) for node, edges in enumerate(self.nodes, 1) for op, source in edges
        )

    @property
    def is_connected(self) -> bool:
        """Tells whether some way leads from input to output along edges other than `none`."""
        # Edges are node-major, so one pass over them reaches all that can be reached.
        reached = {0}
        for op, node, source in self.edges():
            if op != "none" and source in reached:
                reached.add(node)
        return len(self.nodes) in reached


def from_nb201(text: str) -> NB201Genotype:
    """Reads a NAS-Bench-201 cell, ``|op~0|+|op~0|op~1|+|op~0|op~1|op~2|``.

    Raises:
        TypeError: ``text`` is not a str.
        ValueError: another structure, or an operation that NAS-Bench-201 does not have.
    """
    check_text(text)
    nodes = []
    for number, group in enumerate(text.strip().split("+"), 1):
        if len(group) < 2 or group[0] != "|" or group[-1] != "|":
            raise ValueError(f"node {number}: expected |op~0|...|, got {quoted(group)}")
        edges = []
        for entry in group[1:-1].split("|"):
            # Three digits are enough for any node, and of a number with thousands Python's `int`
            # would raise an error of its own.
            parts = re.fullmatch(r"(\w+)~([0-9]{1,3})", entry)
            if not parts:
                raise ValueError(f"node {number}: expected op~predecessor, got {quoted(entry)}")
            edges.append((parts[1], int(parts[2])))
        nodes.append(tuple(edges))
    return NB201Genotype(tuple(nodes))


def to_nb201(genotype: NB201Genotype) -> str:
    """Writes the string that names a cell in NAS-Bench-201.

    Raises:
        TypeError: not a :class:`NB201Genotype`.
    """
    check_kind(genotype, NB201Genotype)
    return "+".join(
        "|" + "".join(f"{op}~{source}|" for op, source in node) for node in genotype.nodes
    )


@dataclass(frozen=True)
class NB201Slots:
    """Gives cells of NAS-Bench-201 six slots, the edges into nodes 1, 2 and 3."""

    ops: tuple[str, ...] = NB201_OPS
    cell_types: tuple[str, ...] = ("normal",)
    length: int = 6
    wirings: tuple[int, ...] = (1, 1, 1)

    def __post_init__(self) -> None:
        check_texts("ops", self.ops)
        LENGTH.check("length", self.length)
        if self.length != 6:
            raise ValueError(f"length is {self.length}; cells of NAS-Bench-201 have 6 slots")

    def genotype(
        self, slots: Mapping[str, Sequence[str]], wiring: Mapping[str, Sequence[int]] | None = None
    ) -> NB201Genotype:
        check_slots(self, slots)
        ops = iter(slots["normal"])
        return NB201Genotype(
            # Slots are the edges (0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3).
            tuple(tuple((next(ops), source) for source in range(node)) for node in (1, 2, 3))
        )

    def slots(self, genotype: AnyGenotype) -> dict[str, list[str]]:
        check_type("genotype", genotype, AnyGenotype)
        if not isinstance(genotype, NB201Genotype):
            raise ValueError("the genotype is not one of NAS-Bench-201")
        return {"normal": [op for node in genotype.nodes for op, _ in node]}


class NB201Layout(Layout[NB201Genotype]):
    """Describes the cells of NAS-Bench-201."""

    name = "nb201"
    title = "NAS-Bench-201"
    cell_types = ("normal",)
    inputs = 1
    operations = NB201_OPS
    is_closed = True
    edges_per_node = None
    has_device_paths = False
    has_tables = True
    formats = {"nb201": to_nb201}
    search_defaults = {"layers": 5, "train_layers": 5}
    absent_in_training = ("drop_path", "auxiliary", "auxiliary_weight")
    training_defaults = {
        "channels": 16, "layers": 5, "epochs": 200, "batch_size": 256, "lr": 0.1,
        "nesterov": True, "weight_decay": 5e-4, "cutout": 0,
        **dict.fromkeys(absent_in_training, 0),
    }  # fmt: skip
    """Table 1; the benchmark does not clip gradients, `grad_clip` does."""

    def nodes_of(self, edges: int, where: str) -> int:
        if edges != EDGES:
            raise ValueError(f"{where}: {edges} edges; a cell of layout nb201 has {EDGES}")
        return 3

    def slots(self, ops: Sequence[str], length: int | None = None) -> NB201Slots:
        return NB201Slots(tuple(ops), length=EDGES if length is None else length)

    def genotype(self, cells: Mapping[CellType, Sequence[Node]]) -> NB201Genotype:
        return NB201Genotype(tuple(cells["normal"]))

    def cells(self, genotype: NB201Genotype) -> dict[CellType, tuple[Node, ...]]:
        return {"normal": genotype.nodes}

    def is_connected(self, genotype: NB201Genotype, cell_type: CellType) -> bool:
        return genotype.is_connected

    def begins(self, text: str) -> bool:
        return text.startswith("|")

    def read(self, text: str) -> NB201Genotype:
        return from_nb201(text)

    def text(self, genotype: NB201Genotype) -> str:
        return to_nb201(genotype)

    def line(self, genotype: NB201Genotype) -> str:
        return to_nb201(genotype)

    def to_value(self, genotype: NB201Genotype) -> dict[str, Any]:
        return {"nb201": to_nb201(genotype)}

    def from_value(self, value: Mapping[str, Any]) -> NB201Genotype | None:
        cell = value.get("nb201")
        return from_nb201(cell) if isinstance(cell, str) and len(value) == 1 else None

    def drawn_cells(self, genotype: NB201Genotype) -> list[DrawnCell]:
        edges: list[tuple[int, int, str | None]] = [
            (source, node, op) for op, node, source in genotype.edges()
        ]
        return [DrawnCell("cell", 1, ["in", "1", "2", "out"], edges, set())]


NB201 = NB201Layout()
