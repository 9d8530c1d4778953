"""Holds the edges of a cell as data: their states, their nodes, and what they may compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from fastnas.checks import check_int, check_type, short
from fastnas.spaces.operations import EDGE_KINDS, EDGE_OPERATIONS, EDGE_OPS, EdgeKind

KEPT_SIZE = 5
"""Of the depthwise kernels whose output "fast" keeps; smaller ones are computed again for less."""

KEPT_DENSE_SIZE = 3
"""Of the dense kernels whose output "fast" and "lean" keep: 9 C products an element take
longer than its write and read, C of them do not."""

Weight = tuple[str, int]
"""A parameter by what it is of, "depthwise", "pointwise", "strided" or "dense", and its size."""


class EdgeTerm(NamedTuple):
    """Holds one candidate: its op, the column of its mixing weight, its kernel if it has any.

    Which parameters and batch norms an op has, its `EdgeKind` says.
    """

    op: str
    weight: int
    size: int = 0
    dilation: int = 1

    @property
    def kind(self) -> EdgeKind:
        return EDGE_KINDS[self.op]

    @property
    def params(self) -> int:
        return self.kind.params

    @property
    def norms(self) -> int:
        return self.kind.norms

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Returns what its parameters are, in their order."""
        kind = self.kind
        return (
            (("depthwise", self.size), ("pointwise", 1)) * kind.halves
            + (("strided", 1),) * kind.strided_convs
            + (("dense", self.size),) * kind.dense_convs
        )


@lru_cache(maxsize=256)
def edge_term(name: str, weight: int, stride: int) -> EdgeTerm | None:
    """Returns an operation's term at a stride; None where `mixed_edges` computes nothing for it."""
    op = EDGE_OPERATIONS[name]
    kind = op.kind(stride)
    return None if kind is None else EdgeTerm(kind, weight, op.size, op.dilation)


class Edge(NamedTuple):
    """Describes an edge from a state (the inputs, then the nodes) to a node."""

    source: int
    target: int
    stride: int
    terms: tuple[EdgeTerm, ...]


class TermRow(NamedTuple):
    """Holds a term as C++ reads it (`EdgeTerm` of csrc/params.h), with its places in a call.

    Places are indices of its first parameter, batch norm and half; and its own among the terms
    whose second half has an input, those whose output is kept (depthwise ones and dense ones are
    counted apart), and the skips. Where it has none of the last four, -1 stands for its place.
    """

    op: int
    edge: int
    weight: int
    size: int
    dilation: int
    halves: int
    param: int
    norm: int
    half: int
    input: int
    kept: int
    skip: int


class Path(NamedTuple):
    """Holds what is left of a table where each edge runs one candidate, or is not there."""

    table: EdgeTable
    """Its mixing weights have one column."""
    edges: tuple[int, ...]
    """Index of each of its edges in the table it comes from; so for the following."""
    params: tuple[int, ...]
    norms: tuple[int, ...]
    inputs: frozenset[int]
    """Inputs that an edge of the path leaves, also one whose candidate has no term."""


def _check_edge_types(name: str, edge: Edge) -> None:
    check_type(name, edge, Edge)
    for part in ("source", "target", "stride"):
        check_int(f"{name}.{part}", getattr(edge, part))
    check_type(f"{name}.terms", edge.terms, tuple)
    for term in edge.terms:
        check_type(f"a term of {name}", term, EdgeTerm)


@dataclass(frozen=True)
class EdgeTable:
    """Holds all edges of a cell, in the order in which nodes can be summed.

    Args:
        inputs: states that are given.
        nodes: states that are sums.
        candidates: columns of the mixing weights.
        edges: at least one for each node, node by node; an edge leaves an input or an earlier
            node, and has stride 2 only where it leaves an input. Its terms have weights of
            their own.
        outputs: how many nodes, the last ones, are the output; 0 stands for all. The others are
            states inside of a call, which is given no gradient of them.
    """

    inputs: int
    nodes: int
    candidates: int
    edges: tuple[Edge, ...]
    outputs: int = 0
    terms: tuple[tuple[Edge, EdgeTerm], ...] = field(init=False, repr=False, compare=False)
    """Of all edges, in order."""
    code: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """The table as an op's schema can carry it."""
    rows: tuple[TermRow, ...] = field(init=False, repr=False, compare=False)
    """Of all terms, in order."""
    params: int = field(init=False, repr=False, compare=False)
    """Parameters of all terms."""
    norms: int = field(init=False, repr=False, compare=False)
    """Batch norms of all terms."""
    halves: int = field(init=False, repr=False, compare=False)
    """Depthwise convolutions of all terms."""
    separable: int = field(init=False, repr=False, compare=False)
    """Terms with a second half, whose input "fast" and "lean" keep for backward."""
    kept: int = field(init=False, repr=False, compare=False)
    """Terms whose last depthwise output "fast" keeps: those of 25 taps or more."""
    kept_dense: int = field(init=False, repr=False, compare=False)
    """Terms whose dense output "fast" and "lean" keep: those of 3x3."""
    skips: int = field(init=False, repr=False, compare=False)
    """Terms that noise is drawn on."""
    weights: tuple[Weight, ...] = field(init=False, repr=False, compare=False)
    """What each parameter is."""
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("inputs", "nodes", "candidates"):
            check_int(name, getattr(self, name), 1)
        check_int("outputs", self.outputs, 0, self.nodes)
        self._set(outputs=self.outputs or self.nodes)
        check_type("edges", self.edges, tuple, list)
        for e, edge in enumerate(self.edges):
            _check_edge_types(f"edges[{e}]", edge)
        for e, edge in enumerate(self.edges):
            if not 0 <= edge.target < self.nodes:
                raise ValueError(f"edge {e} enters node {edge.target} of {self.nodes}")
            if not 0 <= edge.source < self.inputs + edge.target:
                raise ValueError(f"edge {e} leaves state {edge.source}, which comes after its node")
            if edge.stride not in (1, 2) or (edge.stride == 2 and edge.source >= self.inputs):
                raise ValueError(f"edge {e} has stride {edge.stride} from state {edge.source}")
            for term in edge.terms:
                self._check_term(e, edge, term)
            # A choice names its term by the column, so no two terms of an edge may share one.
            weights = [term.weight for term in edge.terms]
            if len(set(weights)) < len(weights):
                raise ValueError(f"edge {e}: its terms share mixing weights, {weights}")
        # Kernels sum node after node, so the edges of a node have to lie together.
        targets = [edge.target for edge in self.edges]
        if targets != sorted(targets):
            raise ValueError(f"edges enter the nodes {targets}; they are listed node by node")
        missing = set(range(self.nodes)) - {edge.target for edge in self.edges}
        if missing or not self.edges:
            raise ValueError(f"no edge enters node {min(missing, default=0)}")
        # These are no cached properties, whose lock is a graph break in Python 3.11.
        self._set(terms=tuple((edge, term) for edge in self.edges for term in edge.terms))
        self._set(code=tuple(self._encode()))
        # A table is the key of caches that are asked in each call; hashing 98 terms there would
        # show.
        self._set(_hash=hash(self.code), **self._places())

    def _places(self) -> dict[str, object]:
        """Returns the rows of all terms, and what they add up to."""
        rows: list[TermRow] = []
        weights: list[Weight] = []
        names = ("params", "norms", "halves", "separable", "kept", "kept_dense", "skips")
        totals = dict.fromkeys(names, 0)

        def place(name: str, count: int) -> int:
            first = totals[name]
            totals[name] += count
            # -1 means that it has none. Parameters and norms are ranges, whose first place is
            # needed though they be empty.
            return first if count or name in ("params", "norms") else -1

        for e, edge in enumerate(self.edges):
            for term in edge.terms:
                kind = term.kind
                kept = place("kept", kind.halves > 0 and term.size >= KEPT_SIZE)
                dense = place("kept_dense", kind.dense_convs > 0 and term.size >= KEPT_DENSE_SIZE)
                rows.append(
                    TermRow(
                        EDGE_OPS.index(term.op), e, term.weight, term.size, term.dilation,
                        kind.halves,
                        param=place("params", kind.params),
                        norm=place("norms", kind.norms),
                        half=place("halves", kind.halves),
                        input=place("separable", kind.halves > 1),
                        kept=max(kept, dense),
                        skip=place("skips", kind.noisy),
                    )
                )  # fmt: skip
                # They are listed in the order in which `mixed_edges` takes parameters.
                weights += term.weights
        return {**totals, "rows": tuple(rows), "weights": tuple(weights)}

    def _set(self, **facts: object) -> None:
        for name, value in facts.items():
            object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        return self._hash

    def _check_term(self, e: int, edge: Edge, term: EdgeTerm) -> None:
        if term.op not in EDGE_OPS:
            raise ValueError(f"edge {e}: no op {term.op!r}; there are {', '.join(EDGE_OPS)}")
        if not 0 <= term.weight < self.candidates:
            raise ValueError(f"edge {e}: mixing weight {term.weight} of {self.candidates}")
        kind, given = term.kind, (term.size, term.dilation)
        if kind.kernels and given not in kind.kernels:
            raise ValueError(
                f"edge {e}: {term.op} of (size, dilation) {given}; allowed: {kind.kernels}"
            )
        if edge.stride not in kind.strides:
            raise ValueError(f"edge {e}: {term.op} at stride {edge.stride}")

    def node_size(self, shapes: Sequence[Sequence[int]]) -> tuple[int, int, int, int]:
        """Returns (N, C, rows, cols) of every node, for inputs of these shapes."""
        # Edge 0 speaks for all: that all nodes have one size is checked by the op.
        source, _, stride, _ = self.edges[0]
        N, C, rows, cols = shapes[source]
        return N, C, -(-rows // stride), -(-cols // stride)

    def param_shapes(self, C: int) -> list[tuple[int, ...]]:
        """Lists the shapes of all parameters, for C channels."""
        channels = {
            "depthwise": (C, 1),
            "pointwise": (C, C),
            "strided": (C // 2, C),
            "dense": (C, C),
        }
        return [(*channels[what], size, size) for what, size in self.weights]

    def path(self, choice: Sequence[int]) -> Path:
        """Returns the edges with the one candidate that each runs.

        Args:
            choice: of every edge the column of its mixing weight, -1: the edge is not there. A
                column that no term has is a candidate that adds nothing (`none`).

        A node that nothing enters keeps one edge without terms: it is zeros.
        """
        check_type("choice", choice, tuple, list)
        return _path(self, tuple(choice))

    def _encode(self) -> Iterator[int]:
        yield from (self.inputs, self.nodes, self.candidates, self.outputs)
        for edge in self.edges:
            yield from (edge.source, edge.target, edge.stride, len(edge.terms))
            for term in edge.terms:
                yield from (EDGE_OPS.index(term.op), term.weight, term.size, term.dilation)

    @staticmethod
    def decode(code: Sequence[int]) -> EdgeTable:
        """Returns the table of a code; ValueError if it is one of none."""
        check_type("code", code, tuple, list)
        return _decode(tuple(code))


@lru_cache(maxsize=256)
def _decode(code: tuple[int, ...]) -> EdgeTable:
    try:
        return _decoded(code)
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(f"code is {short(code)}, no table: {error}") from error


def _decoded(code: tuple[int, ...]) -> EdgeTable:
    inputs, nodes, candidates, outputs, *rest = code
    edges = []
    while rest:
        # `_encode` writes four numbers for an edge, then four for each of its terms.
        source, target, stride, count, *rest = rest
        terms = []
        for _ in range(count):
            op, weight, size, dilation, *rest = rest
            if op not in range(len(EDGE_OPS)):  # -1 would be the last of them
                raise ValueError(f"there is no operation {op}")
            terms.append(EdgeTerm(EDGE_OPS[op], weight, size, dilation))
        edges.append(Edge(source, target, stride, tuple(terms)))
    return EdgeTable(inputs, nodes, candidates, tuple(edges), outputs)


# A step runs one choice in all cells of a type, forward and backward.
@lru_cache(maxsize=64)
def _path(table: EdgeTable, choice: tuple[int, ...]) -> Path:
    if len(choice) != len(table.edges):
        raise ValueError(f"choice has {len(choice)} edges; the table has {len(table.edges)}")
    for e, chosen in enumerate(choice):
        check_int(f"choice[{e}]", chosen, -1, table.candidates - 1)
    empty = set(range(table.nodes))
    edges: list[Edge] = []
    kept: list[int] = []
    params: list[int] = []
    norms: list[int] = []
    spare: dict[int, tuple[int, Edge]] = {}
    for e, edge in enumerate(table.edges):
        spare.setdefault(edge.target, (e, edge))
    for (edge, term), row in zip(table.terms, table.rows):
        if term.weight == choice[row.edge]:
            # The path's weights are [edges, 1], so every term has column 0.
            edges.append(edge._replace(terms=(term._replace(weight=0),)))
            kept.append(row.edge)
            params += range(row.param, row.param + term.params)
            norms += range(row.norm, row.norm + term.norms)
            empty.discard(edge.target)
    for node in sorted(empty):
        e, edge = spare[node]
        # Edges stay sorted by their node: this one goes behind those of the nodes before.
        place = sum(other.target < node for other in edges)
        edges.insert(place, edge._replace(terms=()))
        kept.insert(place, e)
    # An input that is chosen for `none` has an edge and so a gradient, of 0, as in eager.
    inputs = {e.source for e, chosen in zip(table.edges, choice) if chosen >= 0}
    return Path(
        EdgeTable(table.inputs, table.nodes, 1, tuple(edges), table.outputs),
        tuple(kept),
        tuple(params),
        tuple(norms),
        frozenset(s for s in inputs if s < table.inputs),
    )
