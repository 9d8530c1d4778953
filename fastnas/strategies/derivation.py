"""From mixing weights to a genotype."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastnas.spaces import CELL_TYPES, CellType, Genotype, Space

EdgeChoice = tuple[float, int, str]
"""(weight, predecessor, operation): the best operation of an edge."""


def best_operations(w: Tensor, space: Space, cell_type: CellType) -> list[list[EdgeChoice]]:
    """Per intermediate node, its incoming edges with their strongest operation other than `none`,
    strongest edge first; ties go to the lower index."""
    rows, candidates = w.detach().cpu().tolist(), space.candidates(cell_type)
    nodes: list[list[EdgeChoice]] = [[] for _ in range(space.nodes)]
    for (source, target), row, names in zip(space.edges, rows, candidates):
        real = [(weight, name) for weight, name in zip(row, names) if name != "none"]
        if not real:
            raise ValueError(f"edge {(source, target)} of {space.name} offers nothing but none")
        weight, name = max(real, key=lambda pair: pair[0])
        nodes[target - 2].append((weight, source, name))
    return [sorted(edges, key=lambda edge: -edge[0]) for edges in nodes]


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
