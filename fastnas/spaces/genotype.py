"""Holds the genotype of DARTS: the architecture that a search ends with, as data.

A genotype names, for every intermediate node of a cell, the operations that feed it and the
nodes they come from, and which nodes the cell concatenates into its output.

Sources: quark0/darts ``cnn/genotypes.py`` (two edges per node), khanrc/pt.darts
``genotypes.py`` (lists per node), xiaomi-automl/FairDARTS ``fairdarts/genotypes.py`` (any
number of edges per node, none included). The cell of NAS-Bench-201 is in `nb201`.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, SupportsIndex, cast

from fastnas.checks import check_type
from fastnas.spaces.layout import CELL_TYPES, CellType, check_cell_type
from fastnas.spaces.operations import PARAMETER_FREE

Edge = tuple[str, int]
"""An operation and the node whose state it reads."""

Node = tuple[Edge, ...]
"""The edges into one node."""

_LAST_NODE = 999


class AnyGenotype:
    """Defines what the genotypes of all layouts have in common."""

    layout: ClassVar[str]
    """Name of the layout of its cells (:data:`fastnas.spaces.LAYOUTS`)."""

    def edges(self, cell: CellType) -> tuple[tuple[str, int, int], ...]:
        """Returns the edges of a cell as (operation, node, predecessor), node-major."""
        raise NotImplementedError


@dataclass(frozen=True)
class Genotype(AnyGenotype):
    """Holds the normal and the reduction cell of an architecture.

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

    layout = "darts"

    normal: tuple[Node, ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[Node, ...]
    reduce_concat: tuple[int, ...]

    def __post_init__(self) -> None:
        for cell in CELL_TYPES:
            concat = _checked_concat(getattr(self, f"{cell}_concat"), f"{cell}_concat")
            # The concat comes first: triples do not say how many nodes there are.
            nodes = _checked_nodes(getattr(self, cell), concat, cell)
            if max(concat) > len(nodes) + 1:
                raise ValueError(
                    f"{cell}_concat: node {max(concat)} does not exist; "
                    f"{cell} has the nodes 2 to {len(nodes) + 1}"
                )
            object.__setattr__(self, f"{cell}_concat", concat)
            object.__setattr__(self, cell, nodes)

    def nodes(self, cell: CellType) -> tuple[Node, ...]:
        """Returns the edges of a cell, node by node, from node 2."""
        check_cell_type(cell)
        return self.normal if cell == "normal" else self.reduce

    def concat(self, cell: CellType) -> tuple[int, ...]:
        """Returns the nodes whose states a cell concatenates, as given."""
        check_cell_type(cell)
        return self.normal_concat if cell == "normal" else self.reduce_concat

    def edges(self, cell: CellType) -> tuple[tuple[str, int, int], ...]:
        """Returns the edges of a cell as (operation, node, predecessor), node-major."""
        return tuple(
            (op, node, source)
            for node, edges in enumerate(self.nodes(cell), 2)
            for op, source in edges
        )

    def live_nodes(self, cell: CellType) -> tuple[int, ...]:
        """Returns the intermediate nodes that have a state: those an edge reaches from an input.

        An empty node has none, nor has a node fed by such nodes alone. FairDARTS leaves
        them out of the concatenation, and the edges that leave them compute nothing.
        """
        live = {0, 1}
        # Edges are node-major, so the nodes before have been decided.
        for _, node, source in self.edges(cell):
            if source in live:
                live.add(node)
        return tuple(sorted(live - {0, 1}))


def skip_count(genotype: AnyGenotype, cell: CellType = "normal") -> int:
    """Counts a cell's edges that are ``skip_connect``, the usual sign of a collapsed search."""
    check_type("genotype", genotype, AnyGenotype)
    return sum(op == "skip_connect" for op, _, _ in genotype.edges(cell))


def parameter_free_count(genotype: AnyGenotype, cell: CellType = "normal") -> int:
    """Counts a cell's edges with an operation of :data:`fastnas.spaces.PARAMETER_FREE`."""
    check_type("genotype", genotype, AnyGenotype)
    return sum(op in PARAMETER_FREE for op, _, _ in genotype.edges(cell))


def as_sequence(value: object, where: str) -> Sequence[object]:
    """Returns the value, where it is a list or a tuple; ValueError otherwise."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where}: expected a list, got {_short(value)}")
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _checked_concat(value: object, where: str) -> tuple[int, ...]:
    # A range is cut before it is spelled out: its length is whatever the text said.
    given = (
        tuple(value[: _LAST_NODE + 1]) if isinstance(value, range) else as_sequence(value, where)
    )
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
    """Returns the whole number that Python, NumPy or torch holds there; None where it is none."""
    # True is no node 1, though Python would take it for one.
    if isinstance(value, bool):
        return None
    try:
        # Not asked for SupportsIndex beforehand: a table of NAS-Bench-201 took twice as long.
        return operator.index(cast(SupportsIndex, value))
    except TypeError:
        return None


def checked_edge(value: object, node: int, where: str) -> Edge:
    """Returns an edge into a node, an operation's name and an earlier node; else ValueError."""
    edge = as_sequence(value, where)
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
    items = [as_sequence(item, f"{cell}[{k}]") for k, item in enumerate(as_sequence(value, cell))]
    shapes = [_shape(item, f"{cell}[{k}]") for k, item in enumerate(items)]
    if not items:
        raise ValueError(f"{cell}: has no nodes")
    # A mixture of the shapes has no one meaning; the first element that differs is named.
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
        # Flat pairs are two for each node, from node 2.
        placed = [(2 + k // 2, item, f"{cell}[{k}]") for k, item in enumerate(items)]
    elif shapes[0] == "triple":
        placed = [
            (_checked_index(node, f"{cell}[{k}]", 2), (op, source), f"{cell}[{k}]")
            for k, (op, node, source) in enumerate(items)
        ]
        # There are the nodes 2 to the last that is named anywhere, those without a triple included.
        count = max(*concat, *(node for node, _, _ in placed)) - 1
    else:
        count = len(items)
        placed = [
            (2 + k, as_sequence(edge, f"{cell}[{k}][{m}]"), f"{cell}[{k}][{m}]")
            for k, node in enumerate(items)
            for m, edge in enumerate(node)
        ]
    nodes: list[list[Edge]] = [[] for _ in range(count)]
    for target, edge, where in placed:
        nodes[target - 2].append(checked_edge(edge, target, where))
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
