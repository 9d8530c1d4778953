"""Genotypes: the architecture a search ends with, as data.

A genotype names, for every intermediate node of a cell, the operations that feed it and the
nodes they come from, and which nodes the cell concatenates into its output.

Sources: quark0/darts ``cnn/genotypes.py`` (two edges per node), khanrc/pt.darts
``genotypes.py`` (lists per node), xiaomi-automl/FairDARTS ``fairdarts/genotypes.py`` (any
number of edges per node, none included), NAS-Bench-201 (Dong and Yang, 2020).
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import SupportsIndex

from fastnas.checks import check_type
from fastnas.spaces.space import (
    CELL_TYPES,
    NB201_OPS,
    PARAMETER_FREE,
    CellType,
    check_cell_type,
)

Edge = tuple[str, int]
"""An operation and the node whose state it reads."""

Node = tuple[Edge, ...]
"""The edges into one node."""

_LAST_NODE = 999


@dataclass(frozen=True)
class Genotype:
    """The normal and the reduction cell of an architecture.

    ``normal[k]`` holds the edges into node k + 2, each an (operation, predecessor) pair.
    DARTS keeps two edges per node; FairDARTS keeps any number, so a node may be empty and an
    edge may carry several operations.

    Args:
        normal: the nodes of the normal cell. Given in any of the three published shapes and
            kept as tuples per node: lists of pairs per node (pt.darts); one flat list of
            pairs, two for each node (DARTS); one flat list of (operation, node, predecessor)
            triples (FairDARTS), where a node without triples is empty.
        normal_concat: the intermediate nodes that make up the output, in channel order; a
            list, tuple or range.
        reduce: the same for the reduction cell.
        reduce_concat: the same for the reduction cell.

    Operation names may be any identifiers; what builds a network says which it knows.

    Raises:
        ValueError: a cell in no such shape, a predecessor that does not come before its
            node, or a concat that names no, repeated or missing nodes. The message gives the
            position, such as ``normal[5]``.
    """

    normal: tuple[Node, ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[Node, ...]
    reduce_concat: tuple[int, ...]

    def __post_init__(self) -> None:
        for cell in CELL_TYPES:
            concat = _checked_concat(getattr(self, f"{cell}_concat"), f"{cell}_concat")
            nodes = _checked_nodes(getattr(self, cell), concat, cell)
            if max(concat) > len(nodes) + 1:
                raise ValueError(
                    f"{cell}_concat: node {max(concat)} does not exist; "
                    f"{cell} has the nodes 2 to {len(nodes) + 1}"
                )
            object.__setattr__(self, f"{cell}_concat", concat)
            object.__setattr__(self, cell, nodes)

    def nodes(self, cell: CellType) -> tuple[Node, ...]:
        """The edges of a cell, node by node, from node 2."""
        check_cell_type(cell)
        return self.normal if cell == "normal" else self.reduce

    def concat(self, cell: CellType) -> tuple[int, ...]:
        """The nodes whose states a cell concatenates, as given."""
        check_cell_type(cell)
        return self.normal_concat if cell == "normal" else self.reduce_concat

    def edges(self, cell: CellType) -> tuple[tuple[str, int, int], ...]:
        """The edges of a cell as (operation, node, predecessor), node-major."""
        return tuple(
            (op, node, source)
            for node, edges in enumerate(self.nodes(cell), 2)
            for op, source in edges
        )

    def live_nodes(self, cell: CellType) -> tuple[int, ...]:
        """The intermediate nodes that have a state: those an edge reaches from an input.

        An empty node has none, nor has a node fed by such nodes alone. FairDARTS leaves
        them out of the concatenation, and the edges that leave them compute nothing.
        """
        live = {0, 1}
        for _, node, source in self.edges(cell):
            if source in live:
                live.add(node)
        return tuple(sorted(live - {0, 1}))


@dataclass(frozen=True)
class NB201Genotype:
    """A NAS-Bench-201 cell: 4 nodes, and an operation on each of the 6 edges between them.

    ``nodes[k]`` holds the edges into node k + 1, one from each node before it, in order.

    Raises:
        ValueError: other nodes or edges than those, or an operation not in :data:`NB201_OPS`.
    """

    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        given = _sequence(self.nodes, "cell")
        if len(given) != 3:
            raise ValueError(f"cell: expected the edges into 3 nodes, got {len(given)}")
        nodes = []
        for node, edges in enumerate(given, 1):
            where = f"node {node}"
            checked = tuple(_checked_edge(edge, node, where) for edge in _sequence(edges, where))
            sources = [source for _, source in checked]
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
        """The edges as (operation, node, predecessor), node-major; there is only a normal cell."""
        if cell != "normal":
            raise ValueError(f"cell is {cell!r}; a NAS-Bench-201 cell is a 'normal' cell")
        return tuple(
            (op, node, source) for node, edges in enumerate(self.nodes, 1) for op, source in edges
        )

    @property
    def is_connected(self) -> bool:
        """Whether some way leads from the input to the output, along edges other than `none`."""
        reached = {0}
        for op, node, source in self.edges():
            if op != "none" and source in reached:
                reached.add(node)
        return len(self.nodes) in reached


AnyGenotype = Genotype | NB201Genotype


def skip_count(genotype: AnyGenotype, cell: CellType = "normal") -> int:
    """How many edges of a cell are ``skip_connect``, the usual sign of a collapsed search."""
    check_type("genotype", genotype, Genotype, NB201Genotype)
    return sum(op == "skip_connect" for op, _, _ in genotype.edges(cell))


def parameter_free_count(genotype: AnyGenotype, cell: CellType = "normal") -> int:
    """How many edges of a cell hold an operation of :data:`fastnas.spaces.PARAMETER_FREE`."""
    check_type("genotype", genotype, Genotype, NB201Genotype)
    return sum(op in PARAMETER_FREE for op, _, _ in genotype.edges(cell))


def _sequence(value: object, where: str) -> Sequence[object]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where}: expected a list, got {_short(value)}")
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _checked_concat(value: object, where: str) -> tuple[int, ...]:
    # A range is cut before it is spelled out: its length is whatever the text said.
    given = tuple(value[: _LAST_NODE + 1]) if isinstance(value, range) else _sequence(value, where)
    concat = tuple(_checked_index(node, where, 2) for node in given)
    if not concat:
        raise ValueError(f"{where}: names no node")
    if len(set(concat)) != len(concat):
        raise ValueError(f"{where}: repeated node in {_short(list(concat))}")
    return concat


def _checked_index(value: object, where: str, first: int) -> int:
    number = _index(value)
    if number is None or not first <= number <= _LAST_NODE:
        raise ValueError(
            f"{where}: expected the number of a node from {first} to {_LAST_NODE}, "
            f"got {_short(value)}"
        )
    return number


def _index(value: object) -> int | None:
    """The whole number that Python, NumPy or torch holds there; None where it is none."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return None
    try:
        return operator.index(value)
    except TypeError:  # an array
        return None


def _checked_edge(value: object, node: int, where: str) -> Edge:
    edge = _sequence(value, where)
    if len(edge) != 2:
        raise ValueError(f"{where}: expected (operation, predecessor), got {_short(value)}")
    op, source = edge
    if not isinstance(op, str) or not op.isidentifier():
        raise ValueError(f"{where}: expected the name of an operation, got {_short(op)}")
    number = _index(source)
    if number is None or not 0 <= number < node:
        raise ValueError(
            f"{where}: {op} into node {node} must come from one of the nodes 0 to {node - 1}, "
            f"got {_short(source)}"
        )
    return str(op), number


def _checked_nodes(value: object, concat: tuple[int, ...], cell: str) -> tuple[Node, ...]:
    items = [_sequence(item, f"{cell}[{k}]") for k, item in enumerate(_sequence(value, cell))]
    shapes = [_shape(item, f"{cell}[{k}]") for k, item in enumerate(items)]
    if not items:
        raise ValueError(f"{cell}: has no nodes")
    if len(set(shapes)) > 1:
        other = next(k for k, shape in enumerate(shapes) if shape != shapes[0])
        raise ValueError(
            f"{cell}[{other}]: a {shapes[other]} in a list that began with a {shapes[0]}"
        )
    if shapes[0] == "pair":
        if len(items) % 2:
            raise ValueError(
                f"{cell}: a flat list has two (operation, predecessor) pairs for each node, "
                f"got {len(items)} pairs"
            )
        count = len(items) // 2
        placed = [(2 + k // 2, item, f"{cell}[{k}]") for k, item in enumerate(items)]
    elif shapes[0] == "triple":
        placed = [
            (_checked_index(node, f"{cell}[{k}]", 2), (op, source), f"{cell}[{k}]")
            for k, (op, node, source) in enumerate(items)
        ]
        count = max(*concat, *(node for node, _, _ in placed)) - 1
    else:
        count = len(items)
        placed = [
            (2 + k, _sequence(edge, f"{cell}[{k}][{m}]"), f"{cell}[{k}][{m}]")
            for k, node in enumerate(items)
            for m, edge in enumerate(node)
        ]
    nodes: list[list[Edge]] = [[] for _ in range(count)]
    for target, edge, where in placed:
        nodes[target - 2].append(_checked_edge(edge, target, where))
    return tuple(tuple(node) for node in nodes)


def _shape(item: Sequence[object], where: str) -> str:
    if not item or not isinstance(item[0], str):
        return "list of edges"
    if len(item) not in (2, 3):
        raise ValueError(
            f"{where}: expected (operation, predecessor) or (operation, node, predecessor), "
            f"got {_short(item)}"
        )
    return "pair" if len(item) == 2 else "triple"
