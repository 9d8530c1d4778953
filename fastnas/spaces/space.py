"""Describes search spaces: which operations compete on which edge of a cell.

How the cells are made the space's layout says (`fastnas.spaces.darts`, `fastnas.spaces.nb201`).
Edges are listed node-major.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastnas.checks import check_int, check_type
from fastnas.spaces.layout import CELL_NAMES, CELL_TYPES, CellType, Layout, check_cell_type
from fastnas.spaces.layouts import LAYOUTS
from fastnas.spaces.nb201 import EDGES, NB201_OPS
from fastnas.spaces.operations import DARTS_PRIMITIVES


@dataclass(frozen=True)
class Space:
    """Holds the candidates of every edge of each cell type.

    Args:
        name: what reports and files call the space.
        normal: for each edge, node-major, the names of its candidates. Edges may differ in
            which operations they offer but not in how many, so that the logits of a cell
            type are one [E, K] matrix.
        reduce: the same for the reduction cell, with as many edges; empty in layout nb201.
        layout: "darts" or "nb201", see above.

    Operation names are not restricted to :data:`OPS`: the space is data, and what builds the
    operations says which names it knows. Those of layout nb201 are of :data:`NB201_OPS`, as no
    other has a place in its genotype.

    Raises:
        ValueError: the edges do not make up whole nodes of the layout, an edge has no candidates
            or a repeated one, or the edges of a cell type differ in their number of candidates; a
            cell type or operations that the layout does not have.
    """

    name: str
    normal: tuple[tuple[str, ...], ...]
    reduce: tuple[tuple[str, ...], ...] = ()
    layout: str = "darts"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name is {self.name!r}; a space needs a name")
        if not isinstance(self.layout, str) or self.layout not in LAYOUTS:
            raise ValueError(
                f"{self.name}: layout {self.layout!r} is not one of {', '.join(LAYOUTS)}"
            )
        layout = self.cell_layout
        for cell_type in layout.cell_types:
            where = f"{self.name}: {cell_type}"
            candidates = _checked_cell(getattr(self, cell_type), where, layout)
            object.__setattr__(self, cell_type, candidates)
        self._check_cells(layout)

    def _check_cells(self, layout: Layout[Any]) -> None:
        for cell_type in CELL_TYPES:
            if cell_type not in layout.cell_types and getattr(self, cell_type):
                raise ValueError(
                    f"{self.name}: layout {layout.name} has no {CELL_NAMES[cell_type]}"
                )
        # A genotype of a closed layout has names for its own operations only.
        unknown = sorted(self.operations - set(layout.operations)) if layout.is_closed else []
        if unknown:
            raise ValueError(
                f"{self.name}: {', '.join(unknown)} in layout {layout.name}, whose operations are "
                f"{', '.join(layout.operations)}"
            )
        edges = {cell_type: len(getattr(self, cell_type)) for cell_type in layout.cell_types}
        if len(set(edges.values())) > 1:
            given = " and ".join(
                f"{cell_type} has {count} edges" if not k else f"{cell_type} {count}"
                for k, (cell_type, count) in enumerate(edges.items())
            )
            raise ValueError(f"{self.name}: {given}; both cells need the same nodes")

    @property
    def cell_layout(self) -> Layout[Any]:
        """Returns the layout of its cells."""
        return LAYOUTS[self.layout]

    @property
    def cell_types(self) -> tuple[CellType, ...]:
        """Says which cells there are."""
        return self.cell_layout.cell_types

    @property
    def inputs(self) -> int:
        """Counts the input nodes of a cell."""
        return self.cell_layout.inputs

    @property
    def nodes(self) -> int:
        """Counts the n nodes besides the inputs."""
        return self.cell_layout.nodes_of(len(self.normal), self.name)

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """Lists all edges (i, j), node-major; row k of the logits belongs to ``edges[k]``."""
        return self.cell_layout.edges(self.nodes)

    @property
    def kept_edges(self) -> int:
        """Counts the edges of a derived cell."""
        return self.cell_layout.kept_edges(self.nodes)

    @property
    def operations(self) -> frozenset[str]:
        """Returns all operations that some edge offers."""
        return frozenset(name for edge in self.normal + self.reduce for name in edge)

    def candidates(self, cell_type: CellType) -> tuple[tuple[str, ...], ...]:
        """Returns the candidates of every edge of a cell type: E tuples of K names."""
        check_cell_type(cell_type)
        if cell_type not in self.cell_types:
            raise ValueError(f"{self.name} has no {cell_type} cell")
        return self.normal if cell_type == "normal" else self.reduce

    def num_candidates(self, cell_type: CellType) -> int:
        """Counts the K candidates on each edge of a cell type."""
        return len(self.candidates(cell_type)[0])

    def stride(self, cell_type: CellType, edge: tuple[int, int]) -> int:
        """Returns the stride of an edge (i, j): 2 out of the inputs of a reduction cell, else 1.

        Raises:
            ValueError: no such cell type or edge.
        """
        check_cell_type(cell_type)
        if edge not in self.edges:
            raise ValueError(
                f"{self.name}: no edge {edge!r}; an edge is a pair (i, j) with "
                f"0 <= i < j and {self.inputs} <= j <= {self.nodes + self.inputs - 1}"
            )
        return self.cell_layout.stride(cell_type, edge[0])

    def without(self, op: str) -> "Space":
        """Returns the space without an operation on every edge that offers it.

        Raises:
            TypeError: ``op`` is not a str.
            ValueError: an edge would be left with no candidate, edges would be left with
                different numbers of candidates, or ``op`` is no known operation.
        """
        check_type("op", op, str)
        offered = self.operations
        if op not in offered:
            # An operation that is known but not offered is dropped already; an unknown one is a
            # typing error.
            if any(op in layout.operations for layout in LAYOUTS.values()):
                return self
            raise ValueError(f"op is {op!r}; {self.name} has {', '.join(sorted(offered))}")
        return Space(
            f"{self.name}-without-{op}",
            tuple(tuple(name for name in edge if name != op) for edge in self.normal),
            tuple(tuple(name for name in edge if name != op) for edge in self.reduce),
            self.layout,
        )


def _checked_edge(edge: object, where: str) -> tuple[str, ...]:
    if not isinstance(edge, list | tuple) or not all(isinstance(op, str) and op for op in edge):
        raise ValueError(f"{where}: expected a tuple of operation names, got {edge!r}")
    if not edge:
        raise ValueError(f"{where}: no candidate is left; every edge needs at least one")
    if len(set(edge)) != len(edge):
        raise ValueError(f"{where}: repeated candidate in {tuple(edge)}")
    return tuple(edge)


def _checked_cell(cell: object, where: str, layout: Layout[Any]) -> tuple[tuple[str, ...], ...]:
    if not isinstance(cell, list | tuple):
        raise ValueError(f"{where}: expected a tuple with the candidates per edge, got {cell!r}")
    candidates = tuple(_checked_edge(edge, f"{where}[{k}]") for k, edge in enumerate(cell))
    layout.nodes_of(len(candidates), where)
    # Logits of a cell type are one matrix [E, K], so every edge needs the same K.
    sizes = [len(edge) for edge in candidates]
    if min(sizes) != max(sizes):
        raise ValueError(
            f"{where}: every edge needs the same number of candidates, got {sizes} edge by edge"
        )
    return candidates


def uniform_space(name: str, candidates: Sequence[str], nodes: int = 4) -> Space:
    """Makes a space that offers the same candidates on every edge of both cell types.

    Args:
        name: of the space.
        candidates: K operation names, in the order of the logits.
        nodes: number of intermediate nodes.

    Raises:
        ValueError: no candidates, a repeated one, or fewer than one node.
    """
    check_int("nodes", nodes, 1)
    edges = len(LAYOUTS["darts"].edges(nodes))
    cell = (_checked_edge(candidates, f"{name}: candidates"),) * edges
    return Space(name, cell, cell)


def _robust_darts_s1() -> Space:
    max_avg = ("max_pool_3x3", "avg_pool_3x3")
    max_skip = ("max_pool_3x3", "skip_connect")
    max_sep3 = ("max_pool_3x3", "sep_conv_3x3")
    max_dil3 = ("max_pool_3x3", "dil_conv_3x3")
    skip_sep3 = ("skip_connect", "sep_conv_3x3")
    skip_dil3 = ("skip_connect", "dil_conv_3x3")
    skip_dil5 = ("skip_connect", "dil_conv_5x5")
    dil3_dil5 = ("dil_conv_3x3", "dil_conv_5x5")
    # Each line is an intermediate node.
    return Space(
        "S1",
        normal=(
            *(skip_dil3, skip_dil5),
            *(skip_dil5, skip_sep3, skip_dil3),
            *(max_skip, skip_sep3, skip_sep3, skip_dil3),
            *(skip_sep3, max_skip, skip_dil3, dil3_dil5, dil3_dil5),
        ),
        reduce=(
            *(max_avg, max_dil3),
            *(max_avg, max_avg, skip_dil5),
            *(max_avg, max_sep3, skip_dil3, skip_dil5),
            *(max_avg, max_avg, skip_dil5, skip_dil5, skip_dil5),
        ),
    )


SPACES: dict[str, Space] = {
    "S0": uniform_space("S0", DARTS_PRIMITIVES),
    "S1": _robust_darts_s1(),
    "S2": uniform_space("S2", ("skip_connect", "sep_conv_3x3")),
    "S3": uniform_space("S3", ("none", "skip_connect", "sep_conv_3x3")),
    "S4": uniform_space("S4", ("noise", "sep_conv_3x3")),
    "nb201": Space("nb201", (NB201_OPS,) * EDGES, layout="nb201"),
}
"""S0 is the space of DARTS (8 candidates with ``none``), S1 to S4 are those of RobustDARTS, nb201
is that of NAS-Bench-201: 5^6 = 15,625 cells."""


def get_space(name: str) -> Space:
    """Returns the space of that name in :data:`SPACES`.

    Raises:
        ValueError: no such space; the message lists those there are.
    """
    if not isinstance(name, str) or name not in SPACES:
        raise ValueError(f"no search space {name!r}; there are {', '.join(SPACES)}")
    return SPACES[name]
