"""Describes the cells of NAS-Bench-Graph: four graph layers, each on the input or an earlier one.

Node 0 is the input. Each of the nodes 1 to 4 reads one node before it, so that a cell is a tree;
what no other node reads goes to the output. Several spellings are one network: nodes may be listed
in another order, and a skip connection in the middle of a chain computes nothing. The benchmark
trained one of each, and a cell is kept here as the benchmark lists it.

Source: NAS-Bench-Graph (Qin et al., NeurIPS 2022, arXiv 2206.09166), package nas-bench-graph.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Any

from fastnas.checks import check_int, check_texts, check_type, short
from fastnas.spaces.genotype import AnyGenotype, Node, as_sequence
from fastnas.spaces.layout import CellType, DrawnCell, Layout
from fastnas.spaces.slots import LENGTH, check_slots, check_wiring
from fastnas.spaces.text import check_kind, check_text, quoted

GRAPH_OPS: tuple[str, ...] = (
    *("gat", "gcn", "gin", "cheb", "sage", "arma", "graph"),
    *("fc", "skip"),
)
"""The nine operations of NAS-Bench-Graph, in the order of its package."""

NODES = 4
SKIP = "skip"
Links = tuple[int, ...]
SHAPES: tuple[Links, ...] = (
    *((0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 1), (0, 0, 1, 2), (0, 0, 1, 3)),
    *((0, 1, 1, 1), (0, 1, 1, 2), (0, 1, 2, 2), (0, 1, 2, 3)),
)
"""What nodes 1 to 4 read, once for each tree; their places are the first digit of a cell's key."""
CALL = "Arch"
# Three digits are enough for any node, and of thousands Python's `int` would raise its own error.
_NUMBER, _NAME = "[0-9]{1,3}", r"(?:'\w+'|\"\w+\")"
_LISTS = (rf"\[\s*({one}(?:\s*,\s*{one})*)\s*\]" for one in (_NUMBER, _NAME))
_CELL = re.compile(rf"{CALL}\(\s*{next(_LISTS)}\s*,\s*{next(_LISTS)}\s*\)")


@dataclass(frozen=True)
class GraphGenotype(AnyGenotype):
    """Holds a cell of NAS-Bench-Graph, in the spelling under which the benchmark lists it.

    Args:
        links: four numbers, for each of the nodes 1 to 4 the node that it reads; 0 is the input.
        ops: the operations of the nodes 1 to 4, of `GRAPH_OPS`.

    Raises:
        ValueError: other numbers of them, a link to no earlier node, or another operation.
    """

    layout = "nas-bench-graph"

    links: tuple[int, ...]
    ops: tuple[str, ...]

    def __post_init__(self) -> None:
        links, ops = as_sequence(self.links, "links"), as_sequence(self.ops, "ops")
        for name, given in (("links", links), ("ops", ops)):
            if len(given) != NODES:
                raise ValueError(f"{name}: expected {NODES}, one for each node, got {len(given)}")
        read = []
        for node, link in enumerate(links, 1):
            check_int(f"links: what node {node} reads", link, 0, node - 1)
            read.append(int(link))  # type: ignore[call-overload]
        for node, op in enumerate(ops, 1):
            if op not in GRAPH_OPS:
                raise ValueError(
                    f"ops: operation {short(op)} of node {node} is not one of"
                    f" {', '.join(GRAPH_OPS)}"
                )
        kept = _sorted(*_idle_first(*_sorted(tuple(read), tuple(map(str, ops)))))
        object.__setattr__(self, "links", kept[0])
        object.__setattr__(self, "ops", kept[1])

    def edges(self, cell: CellType = "normal") -> tuple[tuple[str, int, int], ...]:
        """Lists (operation, node, predecessor), one for each node; there is only a normal cell."""
        if cell != "normal":
            raise ValueError(f"cell is {cell!r}; a NAS-Bench-Graph cell is a 'normal' cell")
        nodes = range(1, NODES + 1)
        return tuple((op, node, link) for op, node, link in zip(self.ops, nodes, self.links))

    @property
    def key(self) -> int:
        """Returns the number under which the benchmark keeps the cell: its shape, then its ops."""
        digits = [SHAPES.index(self.links), *map(GRAPH_OPS.index, self.ops)]
        return int("".join(map(str, digits)))

    @classmethod
    def from_key(cls, key: int) -> GraphGenotype:
        """Inverts `key`; ValueError for a number under which the benchmark keeps no cell."""
        check_int("key", key, 0)
        digits = [int(digit) for digit in f"{key:05d}"]
        if len(digits) == 1 + NODES and max(digits) < len(GRAPH_OPS):
            genotype = cls(SHAPES[digits[0]], tuple(GRAPH_OPS[i] for i in digits[1:]))
            # Of all spellings of a cell only one has a key.
            if genotype.key == key:
                return genotype
        raise ValueError(f"key is {short(key)}, under which NAS-Bench-Graph keeps no cell")


@cache
def _orders(links: Links) -> tuple[Links, list[tuple[int, ...]]]:
    """Returns the shape of a tree, and every order of its nodes that gives it.

    An order lists, for each node of the shape, the index of the node of the tree.
    """
    best: Links = (NODES,)
    orders: list[tuple[int, ...]] = []
    for order in permutations(range(NODES)):
        number = {0: 0, **{old + 1: new for new, old in enumerate(order, 1)}}
        shape = tuple(number[links[old]] for old in order)
        if any(link >= node for node, link in enumerate(shape, 1)):
            continue  # a node would read one that comes after it
        if shape < best:
            best, orders = shape, []
        if shape == best:
            orders.append(order)
    return best, orders


def _sorted(links: Links, ops: tuple[str, ...]) -> tuple[Links, tuple[str, ...]]:
    """Returns the first spelling of a tree: of the smallest links, and of those the first ops."""
    shape, orders = _orders(links)
    spelled = (tuple(ops[old] for old in order) for order in orders)
    return shape, min(spelled, key=lambda names: [GRAPH_OPS.index(name) for name in names])


def _idle_first(links: Links, ops: tuple[str, ...]) -> tuple[Links, tuple[str, ...]]:
    """Moves skips that compute nothing to the front of the cell, where all of it reads them.

    Such a skip is read by a node, or alone reads what it reads, or hands the input to the output.
    """
    for i in range(NODES):
        if ops[i] != SKIP:
            continue
        is_read = i + 1 in links
        is_alone = links.count(links[i]) == 1
        if is_read or is_alone or _is_input(i + 1, links, ops):
            links, ops = _first(i, links, ops)
    return links, ops


def _is_input(node: int, links: Links, ops: tuple[str, ...]) -> bool:
    """Tells whether only skips lie between the input and what a node hands on."""
    while node:
        if ops[node - 1] != SKIP:
            return False
        node = links[node - 1]
    return True


def _first(i: int, links: Links, ops: tuple[str, ...]) -> tuple[Links, tuple[str, ...]]:
    """Moves a node before all others: what read the input reads it, what read it reads its link."""
    read = [links[i] if link == i + 1 else link for link in links]
    # The nodes up to its old place, the input among them, are one further back.
    moved = [link + 1 if link <= i else link for link in read]
    return (0, *moved[:i], *moved[i + 1 :]), (ops[i], *ops[:i], *ops[i + 1 :])


def from_graph(text: str) -> GraphGenotype:
    """Reads a cell of NAS-Bench-Graph, ``Arch([0, 1, 1, 2], ['gcn', 'cheb', 'gin', 'fc'])``.

    Raises:
        TypeError: ``text`` is not a str.
        ValueError: another structure, or an operation that NAS-Bench-Graph does not have.
    """
    check_text(text)
    found = _CELL.fullmatch(text.strip())
    if not found:
        raise ValueError(
            f"expected Arch([links], [ops]) of four links and four ops, got {quoted(text)}"
        )
    links, ops = (re.findall(r"\w+", part) for part in found.groups())
    return GraphGenotype(tuple(map(int, links)), tuple(ops))


def to_graph(genotype: GraphGenotype) -> str:
    """Writes the call that makes a cell in NAS-Bench-Graph's package.

    Raises:
        TypeError: not a :class:`GraphGenotype`.
    """
    check_kind(genotype, GraphGenotype)
    return f"{CALL}({list(genotype.links)}, {list(genotype.ops)})"


@dataclass(frozen=True)
class GraphSlots:
    """Gives cells of NAS-Bench-Graph four slots, the nodes; a wiring is the node that one reads."""

    ops: tuple[str, ...] = GRAPH_OPS
    cell_types: tuple[str, ...] = ("normal",)
    length: int = NODES
    wirings: tuple[int, ...] = (1, 2, 3, 4)

    def __post_init__(self) -> None:
        check_texts("ops", self.ops)
        LENGTH.check("length", self.length)
        if self.length != NODES:
            raise ValueError(f"length is {self.length}; cells of NAS-Bench-Graph have 4 slots")

    def genotype(
        self, slots: Mapping[str, Sequence[str]], wiring: Mapping[str, Sequence[int]]
    ) -> GraphGenotype:
        check_slots(self, slots)
        check_wiring(self, wiring)
        return GraphGenotype(tuple(wiring["normal"]), tuple(slots["normal"]))

    def slots(self, genotype: AnyGenotype) -> dict[str, list[str]]:
        check_type("genotype", genotype, AnyGenotype)
        if not isinstance(genotype, GraphGenotype):
            raise ValueError("the genotype is not one of NAS-Bench-Graph")
        return {"normal": list(genotype.ops)}


class GraphLayout(Layout[GraphGenotype]):
    """Describes the cells of NAS-Bench-Graph, which are looked up and drawn, not built."""

    name = "nas-bench-graph"
    title = "NAS-Bench-Graph"
    cell_types = ("normal",)
    inputs = 1
    operations = GRAPH_OPS
    is_closed = True
    edges_per_node = 1
    has_device_paths = False
    has_tables = False
    formats = {"nas-bench-graph": to_graph}
    search_defaults = {}
    training_defaults = {}

    def nodes_of(self, edges: int, where: str) -> int:
        raise ValueError(
            f"{where}: layout {self.name} has no candidates on edges; studies search it, by"
            " --evaluator nas-bench-graph:DATA"
        )

    def slots(self, ops: Sequence[str], length: int | None = None) -> GraphSlots:
        return GraphSlots(tuple(ops), length=NODES if length is None else length)

    def genotype(self, cells: Mapping[CellType, Sequence[Node]]) -> GraphGenotype:
        ops, links = zip(*(edge for node in cells["normal"] for edge in node))
        return GraphGenotype(links, ops)

    def cells(self, genotype: GraphGenotype) -> dict[CellType, tuple[Node, ...]]:
        return {"normal": tuple(((op, source),) for op, _, source in genotype.edges())}

    def is_connected(self, genotype: GraphGenotype, cell_type: CellType) -> bool:
        return True

    def begins(self, text: str) -> bool:
        return text.startswith(f"{CALL}(")

    def read(self, text: str) -> GraphGenotype:
        return from_graph(text)

    def text(self, genotype: GraphGenotype) -> str:
        return to_graph(genotype)

    def line(self, genotype: GraphGenotype) -> str:
        return to_graph(genotype)

    def to_value(self, genotype: GraphGenotype) -> dict[str, Any]:
        return {self.name: to_graph(genotype)}

    def from_value(self, value: Mapping[str, Any]) -> GraphGenotype | None:
        cell = value.get(self.name)
        return from_graph(cell) if isinstance(cell, str) and len(value) == 1 else None

    def drawn_cells(self, genotype: GraphGenotype) -> list[DrawnCell]:
        edges: list[tuple[int, int, str | None]] = [
            (source, node, op) for op, node, source in genotype.edges()
        ]
        leaves = [node for node in range(1, NODES + 1) if node not in genotype.links]
        edges += [(node, NODES + 1, None) for node in leaves]
        return [DrawnCell("cell", 1, ["in", "1", "2", "3", "4", "out"], edges, set())]


GRAPH = GraphLayout()
