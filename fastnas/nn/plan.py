"""The edges of a cell or of a mixed op as `mixed_edges` takes them, from what was recognised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from torch import nn

from fastnas.reference import Edge, EdgeTable, EdgeTerm

if TYPE_CHECKING:
    from fastnas.nn.recognise import MixedOpParts


@dataclass(frozen=True)
class Plan:
    """The table of the edges, and the layers of its terms in order."""

    table: EdgeTable
    convs: tuple[nn.Conv2d, ...]
    norms: tuple[nn.BatchNorm2d, ...]

    @staticmethod
    def of(edges: Sequence[MixedOpParts], sources: Sequence[int], nodes: int, inputs: int) -> Plan:
        """Edges node by node, the edge e from state sources[e]."""
        targets = [node for node in range(nodes) for _ in range(inputs + node)]
        rows: list[Edge] = []
        convs: list[nn.Conv2d] = []
        norms: list[nn.BatchNorm2d] = []
        for edge, source, target in zip(edges, sources, targets):
            terms = []
            for k, candidate in enumerate(edge.candidates):
                if candidate is None or candidate.name == "none":
                    continue
                terms.append(edge_term(candidate.name, k, edge.stride))
                convs += candidate.convs
                norms += candidate.norms
            rows.append(Edge(source, target, edge.stride, tuple(terms)))
        table = EdgeTable(inputs, nodes, len(edges[0].candidates), tuple(rows))
        return Plan(table, tuple(convs), tuple(norms))

    @staticmethod
    def of_each_node(edges: Sequence[MixedOpParts], nodes: int) -> tuple[Plan, ...]:
        """Of a cell with two inputs: node by node, all states before it as inputs."""
        left = iter(edges)
        return tuple(
            Plan.of([next(left) for _ in range(n)], range(n), nodes=1, inputs=n)
            for n in range(2, 2 + nodes)
        )


@lru_cache(maxsize=256)
def edge_term(name: str, weight: int, stride: int) -> EdgeTerm:
    """The term of a primitive: "sep_conv_5x5" is a sep_conv of size 5."""
    op, _, size = name.rpartition("_")
    if name == "skip_connect":
        return EdgeTerm("skip" if stride == 1 else "reduce_skip", weight)
    if op.endswith("pool"):
        return EdgeTerm(op, weight)
    return EdgeTerm(op, weight, int(size[0]), 2 if op == "dil_conv" else 1)
