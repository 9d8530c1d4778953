"""From mixing weights to a genotype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastnas.reference.sample_paths import largest, logits_per_node, node_pairs
from fastnas.spaces import CELL_TYPES, AnyGenotype, CellType, Genotype, NB201Genotype, Space

EdgeChoice = tuple[float, int, str]
"""(weight, predecessor, operation): the best operation of an edge."""


def check_finite(what: str, values: Tensor) -> None:
    """Refuses what no genotype can be derived from: a comparison with NaN has no meaning.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if not values.isfinite().all():
        raise ValueError(f"{what} are not finite; no genotype can be derived from them")


def _rows(w: Tensor) -> list[list[float]]:
    """The weights of each edge, [E, K], as numbers."""
    check_finite("mixing weights", w)
    rows: list[list[float]] = w.detach().cpu().tolist()
    return rows


def best_operations(w: Tensor, space: Space, cell_type: CellType) -> list[list[EdgeChoice]]:
    """Per intermediate node, its incoming edges with their strongest operation other than `none`,
    strongest edge first; ties go to the lower index."""
    rows, candidates = _rows(w), space.candidates(cell_type)
    nodes: list[list[EdgeChoice]] = [[] for _ in range(space.nodes)]
    for (source, target), row, names in zip(space.edges, rows, candidates):
        real = [(weight, name) for weight, name in zip(row, names) if name != "none"]
        if not real:
            raise ValueError(f"edge {(source, target)} of {space.name} offers nothing but none")
        weight, name = max(real, key=lambda pair: pair[0])
        nodes[target - 2].append((weight, source, name))
    return [sorted(edges, key=lambda edge: -edge[0]) for edges in nodes]


def kept_edges(beta: Tensor, nodes: Sequence[int], topology: str) -> Tensor:
    """Which edges beta keeps, bool [E]: each node's best two ("top2") or best pair ("pairs")."""
    check_finite("logits of edges", beta)
    kept = []
    for row, n in zip(beta.split(logits_per_node(nodes, topology)), nodes):
        best = largest(row, 2) if topology == "top2" else node_pairs(n)[:, largest(row)[0]]
        kept.append(torch.zeros(n, dtype=torch.bool).index_fill(0, best, True))
    return torch.cat(kept)


def derive_path(choices: Mapping[str, Tensor], space: Space) -> Genotype:
    """The architecture of one path: the candidate of every edge, -1 where there is none.

    Args:
        choices: cell type to int64 [E].
    """
    cells = {}
    for cell_type in CELL_TYPES:
        nodes: list[list[tuple[str, int]]] = [[] for _ in range(space.nodes)]
        rows = zip(space.edges, choices[cell_type].tolist(), space.candidates(cell_type))
        for (source, target), k, names in rows:
            if k >= 0:
                nodes[target - 2].append((names[k], source))
        cells[cell_type] = tuple(map(tuple, nodes))
    concat = tuple(range(2, space.nodes + 2))
    return Genotype(cells["normal"], concat, cells["reduce"], concat)


def path_of(genotype: AnyGenotype, space: Space) -> dict[str, Tensor]:
    """Cell type to int64 [E], the inverse of `derive_path`: -1 where there is no edge.

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
            if choice[e] >= 0:
                raise ValueError(f"two operations are on edge {(source, node)}")
            choice[e] = names.index(op)
        found[cell_type] = choice
    return found


def derive_top_entries(
    weights: Mapping[str, Tensor], space: Space, entries_per_node: int = 2
) -> Genotype:
    """GDAS' rule: each node's largest (edge, operation) entries, `none` apart.

    Unlike in DARTS both may be of one edge. Ties go to the lower edge, then operation.
    """
    cells = {}
    for cell_type in CELL_TYPES:
        nodes: list[list[EdgeChoice]] = [[] for _ in range(space.nodes)]
        rows = _rows(weights[cell_type])
        for (source, target), row, names in zip(space.edges, rows, space.candidates(cell_type)):
            entries = zip(row, names)
            nodes[target - 2] += [(w, source, name) for w, name in entries if name != "none"]
        cells[cell_type] = tuple(
            tuple(
                (name, source)
                for _, source, name in sorted(node, key=lambda entry: -entry[0])[:entries_per_node]
            )
            for node in nodes
        )
    concat = tuple(range(2, space.nodes + 2))
    return Genotype(cells["normal"], concat, cells["reduce"], concat)


def derive_top_edges(
    weights: Mapping[str, Tensor], space: Space, edges_per_node: int = 2, threshold: float = 0.0
) -> Genotype:
    """The DARTS rule: keep each node's strongest edges, each with its strongest operation.

    Edges rank by their largest weight of an operation other than `none` (DARTS section 2.4).

    Args:
        weights: cell type to [E, K].
        space: edges and candidates.
        edges_per_node: 2 in DARTS.
        threshold: edges whose weight is below it are dropped (FairDARTS "threshold_sparse", 0.85).
    """
    concat = tuple(range(2, space.nodes + 2))
    cells = {
        cell_type: tuple(
            tuple(
                (name, source)
                for weight, source, name in edges[:edges_per_node]
                if weight >= threshold
            )
            for edges in best_operations(weights[cell_type], space, cell_type)
        )
        for cell_type in CELL_TYPES
    }
    return Genotype(cells["normal"], concat, cells["reduce"], concat)


def derive_every_edge(w: Tensor, space: Space, threshold: float = 0.0) -> NB201Genotype:
    """The rule of NAS-Bench-201's code: every edge with its strongest operation, be it `none`.

    Ties go to the earlier operation.

    Args:
        w: [6, K].
        space: of layout nb201.
        threshold: an edge none of whose weights reaches it is `none`.
    """
    rows = zip(space.edges, _rows(w), space.candidates("normal"))
    nodes: list[list[tuple[str, int]]] = [[] for _ in range(space.nodes)]
    for (source, target), row, names in rows:
        weight, name = max(zip(row, names), key=lambda pair: pair[0])
        nodes[target - space.inputs].append((name if weight >= threshold else "none", source))
    return NB201Genotype(tuple(map(tuple, nodes)))
