"""Derives genotypes from mixing weights, logits of edges, and sampled paths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fastnas.reference.sample_paths import largest, logits_per_node, node_pairs
from fastnas.spaces import AnyGenotype, CellType, Space
from fastnas.spaces.genotype import Node

Entry = tuple[float, int, str]
"""(weight, predecessor, operation): what an edge may do."""


def check_finite(what: str, values: Tensor) -> None:
    """Refuses what no genotype can be derived from: a comparison with NaN has no meaning.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if not values.isfinite().all():
        raise ValueError(f"{what} are not finite; no genotype can be derived from them")


def _rows(w: Tensor) -> list[list[float]]:
    """Returns the weights of each edge, [E, K], as numbers."""
    check_finite("mixing weights", w)
    # This is one copy from the device; reading weight by weight would wait for it E K times.
    rows: list[list[float]] = w.detach().cpu().tolist()
    return rows


def _nodes(space: Space, edges: Iterable[tuple[int, Entry]]) -> list[list[Entry]]:
    """Sorts entries, given with the node that each goes into, node by node."""
    nodes: list[list[Entry]] = [[] for _ in range(space.nodes)]
    for target, entry in edges:
        # Nodes are counted with the inputs of the cell before them.
        nodes[target - space.inputs].append(entry)
    return nodes


def _strongest(w: Tensor, space: Space, cell_type: CellType) -> list[list[Entry]]:
    """Returns each node's edges, each with its strongest operation; ties go to the earlier one.

    `none` is one of them only where a derived cell may have it.
    """
    found = []
    for (source, target), row, names in zip(space.edges, _rows(w), space.candidates(cell_type)):
        entries = _entries(row, names, space)
        if not entries:
            raise ValueError(f"edge {(source, target)} of {space.name} offers nothing but none")
        # `max`, and `sorted` in `_largest`, keep the first of equal ones: on every machine a tie
        # has the same end.
        weight, name = max(entries, key=lambda entry: entry[0])
        found.append((target, (weight, source, name)))
    return _nodes(space, found)


def _entries(row: list[float], names: tuple[str, ...], space: Space) -> list[tuple[float, str]]:
    """Returns an edge's weights with the operations that a derived edge may have."""
    may_be_none = space.cell_layout.derives_none
    return [(weight, name) for weight, name in zip(row, names) if may_be_none or name != "none"]


def _largest(entries: list[Entry], count: int | None) -> list[Entry]:
    """Returns the `count` largest, largest first; ties go to the earlier. None: all, as is."""
    if count is None:
        return entries
    return sorted(entries, key=lambda entry: -entry[0])[:count]


def kept_edges(beta: Tensor, nodes: Sequence[int], topology: str) -> Tensor:
    """Tells which edges beta keeps, bool [E]: each node's best two ("top2") or pair ("pairs")."""
    check_finite("logits of edges", beta)
    kept = []
    for row, n in zip(beta.split(logits_per_node(nodes, topology)), nodes):
        # Version 2 of ROME has a logit per edge, version 1 one per pair, whose column of
        # `node_pairs` names both of its edges.
        best = largest(row, 2) if topology == "top2" else node_pairs(n)[:, largest(row)[0]]
        kept.append(torch.zeros(n, dtype=torch.bool).index_fill(0, best, True))
    return torch.cat(kept)


def derive_path(choices: Mapping[str, Tensor], space: Space) -> AnyGenotype:
    """Derives the architecture of one path: the candidate of every edge, -1 where there is none.

    Args:
        choices: cell type to int64 [E].
    """
    cells: dict[CellType, list[Node]] = {}
    for cell_type in space.cell_types:
        nodes: list[list[tuple[str, int]]] = [[] for _ in range(space.nodes)]
        rows = zip(space.edges, choices[cell_type].tolist(), space.candidates(cell_type))
        for (source, target), k, names in rows:
            if k >= 0:
                nodes[target - space.inputs].append((names[k], source))
        cells[cell_type] = list(map(tuple, nodes))
    return _genotype(cells, space)


def _genotype(cells: Mapping[CellType, Sequence[Node]], space: Space) -> AnyGenotype:
    genotype: AnyGenotype = space.cell_layout.genotype(cells)
    return genotype


def path_of(genotype: AnyGenotype, space: Space) -> dict[str, Tensor]:
    """Inverts `derive_path`: returns cell type to int64 [E], -1 where there is no edge.

    Raises:
        ValueError: a cell of another space, or with two operations on an edge.
    """
    found: dict[str, Tensor] = {}
    for cell_type in space.cell_types:
        choice = torch.full((len(space.edges),), -1, dtype=torch.int64)
        for op, node, source in genotype.edges(cell_type):
            if (source, node) not in space.edges:
                raise ValueError(f"space {space.name} has no edge {(source, node)}")
            e = space.edges.index((source, node))
            names = space.candidates(cell_type)[e]
            if op not in names:
                raise ValueError(f"space {space.name} has no {op} on edge {(source, node)}")
            # A path runs one candidate an edge; GDAS may derive two on one edge, which no path is.
            if choice[e] >= 0:
                raise ValueError(f"two operations are on edge {(source, node)}")
            choice[e] = names.index(op)
        found[cell_type] = choice
    return found


def derive_top_entries(weights: Mapping[str, Tensor], space: Space) -> AnyGenotype:
    """Derives by GDAS' rule: it keeps each node's largest (edge, operation) entries but `none`.

    Unlike in DARTS both may be of one edge. Ties go to the lower edge, then operation. Where a cell
    keeps all its edges there is nothing to rank between them, and the rule is that of
    `derive_top_edges`.
    """
    count = space.cell_layout.edges_per_node
    if count is None:
        return derive_top_edges(weights, space)
    cells: dict[CellType, list[Node]] = {}
    for cell_type in space.cell_types:
        rows = zip(space.edges, _rows(weights[cell_type]), space.candidates(cell_type))
        entries = (
            (target, (weight, source, name))
            for (source, target), row, names in rows
            for weight, name in _entries(row, names, space)
        )
        cells[cell_type] = [
            tuple((name, source) for _, source, name in _largest(node, count))
            for node in _nodes(space, entries)
        ]
    return _genotype(cells, space)


def derive_top_edges(
    weights: Mapping[str, Tensor],
    space: Space,
    edges_per_node: int | None = None,
    threshold: float = 0.0,
) -> AnyGenotype:
    """Derives by DARTS' rule: it keeps each node's strongest edges with their strongest operation.

    Edges rank by their largest weight of an operation other than `none` (DARTS section 2.4). In
    NAS-Bench-201, as in its code, a cell keeps every edge, be its strongest operation `none`.

    Args:
        weights: cell type to [E, K].
        space: edges and candidates.
        edges_per_node: None: as many as the layout's cells keep; what keeps all keeps all.
        threshold: edges whose weight is below it are dropped (FairDARTS "threshold_sparse", 0.85);
            in cells that keep all edges they are `none`.
    """
    layout = space.cell_layout
    all_edges = layout.edges_per_node is None
    # The rank between edges is asked only where a cell leaves some of them out.
    count = None if all_edges else edges_per_node or layout.edges_per_node

    def kept(edges: list[Entry]) -> Node:
        ranked = _largest(edges, count)
        if layout.derives_none:
            return tuple((name if w >= threshold else "none", source) for w, source, name in ranked)
        return tuple((name, source) for weight, source, name in ranked if weight >= threshold)

    cells = {
        cell_type: [kept(edges) for edges in _strongest(weights[cell_type], space, cell_type)]
        for cell_type in space.cell_types
    }
    return _genotype(cells, space)
