"""Says what a layout of cells is: everything about the cells of a space but their candidates.

A cell is a directed acyclic graph: inputs, then nodes, each a sum over edges from states before it.
Each layout is a module of its own (`darts`, `nb201`, `graph`) with one subclass; everything else
asks a space, a genotype or `LAYOUTS` for it and never looks at its name. What needs torch is found
by the layout's name in tables further up: `fastnas.nn.SEARCH_NETWORKS` and `EVAL_NETWORKS`, and the
eager networks of `fastnas.reference`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

if TYPE_CHECKING:
    from fastnas.spaces.genotype import Node
    from fastnas.spaces.slots import SlotLayout

G = TypeVar("G")
"""The genotype of a layout."""

CellType = Literal["normal", "reduce"]
CELL_TYPES: tuple[CellType, ...] = ("normal", "reduce")
CELL_NAMES: dict[CellType, str] = {"normal": "normal cell", "reduce": "reduction cell"}


def check_cell_type(cell_type: str) -> None:
    """Raises ValueError unless ``cell_type`` is "normal" or "reduce"."""
    if cell_type not in CELL_TYPES:
        raise ValueError(f"cell type {cell_type!r} is not one of {', '.join(CELL_TYPES)}")


class DrawnCell(NamedTuple):
    """Describes a cell to be drawn."""

    title: str
    inputs: int
    names: list[str]
    """Of all nodes: the inputs first, the output last."""
    edges: list[tuple[int, int, str | None]]
    """(source, target, operation); no operation where a state goes into the output as it is."""
    dead: set[int]
    """Nodes that nothing reaches."""


class Layout(ABC, Generic[G]):
    """Describes how the cells of a space are made, derived, written and drawn."""

    name: ClassVar[str]
    title: ClassVar[str]
    """What its authors call it."""
    cell_types: ClassVar[tuple[CellType, ...]]
    inputs: ClassVar[int]
    """The number of input nodes of a cell."""
    operations: ClassVar[tuple[str, ...]]
    """Those that fastnas builds by name."""
    is_closed: ClassVar[bool]
    """Whether a space can offer no other operations."""
    edges_per_node: ClassVar[int | None]
    """Edges that a node of a derived cell keeps; None: all of them, some as ``none``."""
    has_device_paths: ClassVar[bool]
    """Whether CUDA's kernels read the sampled paths of its cells from the device's memory."""
    has_tables: ClassVar[bool]
    """Whether there are published tables of the accuracy of every cell."""
    search_defaults: ClassVar[Mapping[str, Any]]
    """Published settings of a search in such a space."""
    training_defaults: ClassVar[Mapping[str, Any]]
    """Published settings with which a derived network is trained from scratch on CIFAR-10; empty
    where fastnas builds no network of such cells."""
    absent_in_training: ClassVar[tuple[str, ...]] = ()
    """Settings of that training which such a network does not have."""

    @property
    def derives_none(self) -> bool:
        """Tells whether a derived cell may have ``none`` on an edge."""
        return self.edges_per_node is None

    @abstractmethod
    def nodes_of(self, edges: int, where: str) -> int:
        """Counts the nodes besides the inputs of a cell with so many edges.

        Raises:
            ValueError: there is no such cell; the message begins with ``where``.
        """

    def edges(self, nodes: int) -> tuple[tuple[int, int], ...]:
        """Lists all edges (i, j), node-major: into every node from every state before it."""
        first = self.inputs
        # Rows of the logits [E, K] stand in this order, as in the public code.
        return tuple((i, j) for j in range(first, nodes + first) for i in range(j))

    def kept_edges(self, nodes: int) -> int:
        """Counts the edges of a derived cell."""
        if self.edges_per_node is None:
            return len(self.edges(nodes))
        return self.edges_per_node * nodes

    def stride(self, cell_type: CellType, source: int) -> int:
        """Returns the stride of edges out of a state: 2 out of the inputs of a reduction cell."""
        return 2 if cell_type == "reduce" and source < self.inputs else 1

    @abstractmethod
    def slots(self, ops: Sequence[str], length: int | None = None) -> SlotLayout:
        """Says how derived cells are made of operations in slots.

        Args:
            ops: the candidates of every edge.
            length: slots of a cell; None: as published.
        """

    @abstractmethod
    def genotype(self, cells: Mapping[CellType, Sequence[Node]]) -> G:
        """Makes the genotype of cells, given as the edges into each of their nodes."""

    @abstractmethod
    def cells(self, genotype: G) -> dict[CellType, tuple[Node, ...]]:
        """Returns the edges into each node, by cell type: the inverse of `genotype`."""

    @abstractmethod
    def is_connected(self, genotype: G, cell_type: CellType) -> bool:
        """Tells whether something of a cell's input reaches its output."""

    # Texts.

    formats: ClassVar[Mapping[str, Callable[[Any], str]]]
    """Names of the published formats to what writes them; `read` reads them all."""

    @abstractmethod
    def begins(self, text: str) -> bool:
        """Tells whether a text, unless it is JSON, begins as one of the formats does."""

    @abstractmethod
    def read(self, text: str) -> G:
        """Reads a genotype in any of the formats; ValueError where there is none."""

    @abstractmethod
    def text(self, genotype: G) -> str:
        """Writes the genotype in the format in which its code base publishes it, if it can be."""

    @abstractmethod
    def line(self, genotype: G) -> str:
        """Writes one line that `fastnas.spaces.parse` reads back, whatever the genotype's shape."""

    @abstractmethod
    def to_value(self, genotype: G) -> dict[str, Any]:
        """Returns the genotype as a JSON object."""

    @abstractmethod
    def from_value(self, value: Mapping[str, Any]) -> G | None:
        """Inverts `to_value`; returns None for an object that is of another layout."""

    @abstractmethod
    def drawn_cells(self, genotype: G) -> list[DrawnCell]:
        """Returns the cells of a genotype as pictures show them."""
