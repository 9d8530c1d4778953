"""Search spaces: which operations compete on which edge of a cell.

A cell is a directed acyclic graph, in one of two layouts. Edges are listed node-major.

darts: nodes 0 and 1 are its inputs (the outputs of the two cells before it); each of the ``n``
intermediate nodes j = 2 .. n+1 receives an edge from every node i < j, so there are
E = 2 + 3 + ... + (n+1) = n (n + 3) / 2 edges: 14 for the usual n = 4, (0, 2), (1, 2), (0, 3), ...
There is a normal and a reduction cell; a derived cell keeps two edges a node.

nb201: node 0 is its input, nodes 1, 2, 3 receive an edge from every node before them, the last is
its output: 6 edges (0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3). There is only the normal cell
(residual blocks stand for the reduction cells); a derived cell keeps all edges, some as ``none``.

Sources: DARTS (Liu et al., 2019), quark0/darts ``cnn/genotypes.py``;
RobustDARTS (Zela et al., 2020), automl/RobustDARTS ``src/spaces.py``;
NAS-Bench-201 (Dong & Yang, ICLR 2020), D-X-Y/AutoDL-Projects.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Literal

from fastnas.checks import check_int, check_type

CellType = Literal["normal", "reduce"]
CELL_TYPES: tuple[CellType, ...] = ("normal", "reduce")

Layout = Literal["darts", "nb201"]
LAYOUTS: tuple[Layout, ...] = ("darts", "nb201")
_NB201_EDGES = 6

DARTS_PRIMITIVES: tuple[str, ...] = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
"""The candidates of DARTS, in the order in which its ``alpha`` indexes them."""

NB201_OPS: tuple[str, ...] = (
    "none",
    "skip_connect",
    "nor_conv_1x1",
    "nor_conv_3x3",
    "avg_pool_3x3",
)
"""The five operations of NAS-Bench-201, in the order of its public code."""

OPS: tuple[str, ...] = (*DARTS_PRIMITIVES, "sep_conv_7x7", "conv_7x1_1x7", "noise")
"""Every operation of a DARTS cell that fastnas can build by name."""

PARAMETER_FREE: frozenset[str] = frozenset(
    {"none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "noise"}
)
"""Operations without parameters at stride 1 (at stride 2 ``skip_connect`` has two convolutions)."""


def check_cell_type(cell_type: str) -> None:
    """Raise ValueError unless ``cell_type`` is "normal" or "reduce"."""
    if cell_type not in CELL_TYPES:
        raise ValueError(f"cell type {cell_type!r} is not one of {', '.join(CELL_TYPES)}")


@dataclass(frozen=True)
class Space:
    """The candidates of every edge of each cell type.

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
        ValueError: the edges do not make up whole nodes, an edge has no candidates or a
            repeated one, or the edges of a cell type differ in their number of candidates; in
            layout nb201, other than 6 edges, other operations, or a reduction cell.
    """

    name: str
    normal: tuple[tuple[str, ...], ...]
    reduce: tuple[tuple[str, ...], ...] = ()
    layout: Layout = "darts"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name is {self.name!r}; a space needs a name")
        if self.layout not in LAYOUTS:
            raise ValueError(
                f"{self.name}: layout {self.layout!r} is not one of {', '.join(LAYOUTS)}"
            )
        for cell_type in self.cell_types:
            where = f"{self.name}: {cell_type}"
            candidates = _checked_cell(getattr(self, cell_type), where, self.layout)
            object.__setattr__(self, cell_type, candidates)
        if self.layout == "nb201":
            self._check_nb201()
        elif len(self.normal) != len(self.reduce):
            raise ValueError(
                f"{self.name}: normal has {len(self.normal)} edges and reduce "
                f"{len(self.reduce)}; both cells need the same nodes"
            )

    def _check_nb201(self) -> None:
        if self.reduce:
            raise ValueError(f"{self.name}: layout nb201 has no reduction cell")
        unknown = sorted(set(self.operations) - set(NB201_OPS))
        if unknown:
            raise ValueError(
                f"{self.name}: {', '.join(unknown)} in layout nb201, whose operations are "
                f"{', '.join(NB201_OPS)}"
            )

    @property
    def cell_types(self) -> tuple[CellType, ...]:
        """Which cells there are."""
        return ("normal",) if self.layout == "nb201" else CELL_TYPES

    @property
    def inputs(self) -> int:
        """The number of input nodes of a cell."""
        return 1 if self.layout == "nb201" else 2

    @property
    def nodes(self) -> int:
        """The number n of nodes besides the inputs."""
        return 3 if self.layout == "nb201" else _nodes_of(len(self.normal))

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """All edges (i, j), node-major; row k of the logits belongs to ``edges[k]``."""
        first = self.inputs
        return tuple((i, j) for j in range(first, self.nodes + first) for i in range(j))

    @property
    def kept_edges(self) -> int:
        """The number of edges of a derived cell."""
        return len(self.edges) if self.layout == "nb201" else 2 * self.nodes

    @property
    def operations(self) -> frozenset[str]:
        """All operations that some edge offers."""
        return frozenset(name for edge in self.normal + self.reduce for name in edge)

    def candidates(self, cell_type: CellType) -> tuple[tuple[str, ...], ...]:
        """The candidates of every edge of a cell type: E tuples of K names."""
        check_cell_type(cell_type)
        if cell_type not in self.cell_types:
            raise ValueError(f"{self.name} has no {cell_type} cell")
        return self.normal if cell_type == "normal" else self.reduce

    def num_candidates(self, cell_type: CellType) -> int:
        """The number K of candidates on each edge of a cell type."""
        return len(self.candidates(cell_type)[0])

    def stride(self, cell_type: CellType, edge: tuple[int, int]) -> int:
        """The stride of an edge (i, j): 2 where a reduction cell leaves an input node, else 1.

        Raises:
            ValueError: no such cell type or edge.
        """
        check_cell_type(cell_type)
        if edge not in self.edges:
            raise ValueError(
                f"{self.name}: no edge {edge!r}; an edge is a pair (i, j) with "
                f"0 <= i < j and {self.inputs} <= j <= {self.nodes + self.inputs - 1}"
            )
        return 2 if cell_type == "reduce" and edge[0] < 2 else 1

    def without(self, op: str) -> "Space":
        """The space with an operation dropped on every edge that offers it.

        Raises:
            TypeError: ``op`` is not a str.
            ValueError: an edge would be left with no candidate, edges would be left with
                different numbers of candidates, or ``op`` is no known operation.
        """
        check_type("op", op, str)
        offered = self.operations
        if op not in offered:
            if op in (*OPS, *NB201_OPS):
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


def _checked_cell(cell: object, where: str, layout: Layout) -> tuple[tuple[str, ...], ...]:
    if not isinstance(cell, list | tuple):
        raise ValueError(f"{where}: expected a tuple with the candidates per edge, got {cell!r}")
    candidates = tuple(_checked_edge(edge, f"{where}[{k}]") for k, edge in enumerate(cell))
    edges = len(candidates)
    nodes = _nodes_of(edges)
    if layout == "nb201":
        if edges != _NB201_EDGES:
            raise ValueError(f"{where}: {edges} edges; a cell of layout nb201 has {_NB201_EDGES}")
    elif nodes < 1 or nodes * (nodes + 3) // 2 != edges:
        raise ValueError(
            f"{where}: {edges} edges make no whole number of nodes; "
            "n intermediate nodes have n (n + 3) / 2 edges: 2, 5, 9, 14, 20, ..."
        )
    sizes = [len(edge) for edge in candidates]
    if min(sizes) != max(sizes):
        raise ValueError(
            f"{where}: every edge needs the same number of candidates, got {sizes} edge by edge"
        )
    return candidates


def _nodes_of(edges: int) -> int:
    return (isqrt(9 + 8 * edges) - 3) // 2


def uniform_space(name: str, candidates: Sequence[str], nodes: int = 4) -> Space:
    """A space that offers the same candidates on every edge of both cell types.

    Args:
        name: of the space.
        candidates: K operation names, in the order of the logits.
        nodes: number of intermediate nodes.

    Raises:
        ValueError: no candidates, a repeated one, or fewer than one node.
    """
    check_int("nodes", nodes, 1)
    cell = (_checked_edge(candidates, f"{name}: candidates"),) * (nodes * (nodes + 3) // 2)
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
    # One line per intermediate node.
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
    "nb201": Space("nb201", (NB201_OPS,) * _NB201_EDGES, layout="nb201"),
}
"""S0 is the space of DARTS (8 candidates with ``none``), S1 to S4 are those of RobustDARTS, nb201
is that of NAS-Bench-201: 5^6 = 15,625 cells."""


def get_space(name: str) -> Space:
    """The space of that name in :data:`SPACES`.

    Raises:
        ValueError: no such space; the message lists those there are.
    """
    if not isinstance(name, str) or name not in SPACES:
        raise ValueError(f"no search space {name!r}; there are {', '.join(SPACES)}")
    return SPACES[name]
