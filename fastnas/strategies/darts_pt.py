"""Implements DARTS-PT (Wang et al., ICLR 2021, arXiv 2108.04392): the supernet is asked what it
would miss, in place of the logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnas.bounds import whole
from fastnas.nn import ArchParameters
from fastnas.options import option
from fastnas.spaces import AnyGenotype, CellType, Space
from fastnas.strategies.base import Accuracy, Stage
from fastnas.strategies.cost import shares_of_weights
from fastnas.strategies.derivation import derive_top_edges
from fastnas.strategies.margins import Undecided
from fastnas.strategies.mixture import Mixture

TUNING_RATE = 0.1
"""Learning rate of the second stage, as a share of the search's first one."""


class DARTSPT(Mixture):
    """Searches as DARTS, then chooses by perturbation, while the supernet is tuned.

    The second stage goes on with the weights and logits of the first. At its beginning and after
    every `tune_epochs` epochs, each cell type decides something at random of what is left: for all
    edges their operation, then for all nodes that choose among their edges which ones are kept.

    An edge keeps the operation without which the supernet has the lowest accuracy, its weight set
    to 0 and nothing renormalised; it then has weight 1. Of a node's edges the one without which the
    accuracy is highest is dropped until two are left. Equal accuracies go to the first operation,
    and drop the last edge. An edge never keeps `none` where derived cells cannot have it.

    The accuracy is that on the images of the logits, as a test would see them, in whole batches by
    their own statistics; the released code augments them. Its cosine in the second stage does not
    run, so the rate there is constant: a tenth of `lr`. In NAS-Bench-201 its last decision comes
    an epoch earlier than here.
    """

    name = "darts-pt"
    source = "Wang et al., ICLR 2021, arXiv 2108.04392"
    layout_defaults = {"nb201": {"epochs": 100}}

    tune_epochs: int = option(5, "epochs of tuning between two decisions", whole(1, 1000))

    def __post_init__(self) -> None:
        super().__post_init__()
        self._space: Space | None = None
        self._stage = 0
        self.operations: dict[str, list[int]] = {}
        """By cell type the operation that each edge keeps, -1 where it is not decided."""
        self.dropped: dict[str, list[int]] = {}
        """By cell type the edges that no node keeps."""
        self.nodes_left: dict[str, list[int]] = {}
        """By cell type the nodes, counted from the first after the inputs, still to choose."""

    def space(self, space: Space) -> Space:
        self._space = super().space(space)
        return self._space

    def stages(self, layers: int, epochs: int) -> Sequence[Stage]:
        decisions = len(self._searched.edges) + len(self._choosing_nodes())
        tuning = self.tune_epochs * (decisions - 1) + 1
        return [
            Stage(layers, epochs),
            Stage(layers, tuning, continues=True, constant_rate=TUNING_RATE),
        ]

    def start_stage(self, stage: int) -> None:
        self._stage = stage
        cells = self._searched.cell_types
        self.operations = {cell: [-1] * len(self._searched.edges) for cell in cells}
        self.dropped = {cell: [] for cell in cells}
        self.nodes_left = {cell: self._choosing_nodes() for cell in cells}

    def state_dict(self) -> dict[str, Any]:
        """Returns what has been decided, plain data."""
        parts = self.operations, self.dropped, self.nodes_left
        return {
            name: {cell: list(row) for cell, row in part.items()}
            for name, part in zip(("operations", "dropped", "nodes_left"), parts)
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to what had been decided."""
        for name in ("operations", "dropped", "nodes_left"):
            setattr(self, name, {cell: list(row) for cell, row in state[name].items()})

    def mixing_weights(self, arch: ArchParameters) -> dict[str, Tensor]:
        """Returns softmax(alpha), of an edge that has decided 1 for its operation and else 0."""
        found = super().mixing_weights(arch)
        for cell, w in found.items():
            decided = torch.tensor(self.operations.get(cell, [-1] * len(w)), device=w.device)
            alone = torch.zeros_like(w).scatter(1, decided.clamp(min=0)[:, None], 1)
            found[cell] = torch.where((decided >= 0)[:, None], alone, w)
        return found

    def forward_weights(self, arch: ArchParameters) -> dict[str, Tensor]:
        return {
            cell: without_edges(w, self.dropped.get(cell, []))
            for cell, w in self.mixing_weights(arch).items()
        }

    def validation_weights(self, arch: ArchParameters) -> dict[str, Tensor]:
        return self.forward_weights(arch)

    def shares(self, arch: ArchParameters, space: Space) -> dict[str, Tensor]:
        weights = self.forward_weights(arch)
        return {cell: shares_of_weights(weights[cell], space, cell) for cell in space.cell_types}

    def decide(self, epoch: int, arch: ArchParameters, accuracy: Accuracy) -> None:
        # A run that is resumed within an epoch has made the decision of that epoch.
        due = self._stage == 1 and epoch % self.tune_epochs == 0
        if not due or self._made > epoch // self.tune_epochs:
            return
        for cell in self._searched.cell_types:
            open_edges = [e for e, k in enumerate(self.operations[cell]) if k < 0]
            if open_edges:
                edge = _drawn(open_edges)
                self.operations[cell][edge] = self._kept_operation(cell, edge, arch, accuracy)
            else:
                node = _drawn(self.nodes_left[cell])
                self.dropped[cell] += self._dropped_edges(cell, node, arch, accuracy)
                self.nodes_left[cell].remove(node)

    def derive_cells(self, arch: ArchParameters, space: Space) -> AnyGenotype:
        """Derives what was decided, and by DARTS' rule what was not."""
        return derive_top_edges(self.forward_weights(arch), space)

    def undecided(self, arch: ArchParameters, space: Space) -> dict[str, Undecided]:
        """Counts the operations that logits within the initial noise have chosen."""
        if any(k < 0 for row in self.operations.values() for k in row) or not self.operations:
            return super().undecided(arch, space)
        return {cell: Undecided(0, len(row), "edges") for cell, row in self.operations.items()}

    def not_capturable(self) -> str | None:
        return super().not_capturable() or "darts-pt decides on the host what its edges run"

    @property
    def _searched(self) -> Space:
        if self._space is None:
            raise RuntimeError("darts-pt decides in a space; ask for it first")
        return self._space

    @property
    def _made(self) -> int:
        """Counts the decisions of a cell type; both have as many."""
        cell = self._searched.cell_types[0]
        edges = sum(k >= 0 for k in self.operations[cell])
        return edges + len(self._choosing_nodes()) - len(self.nodes_left[cell])

    def _choosing_nodes(self) -> list[int]:
        """Lists the nodes that have more edges than they keep."""
        kept, space = self._searched.cell_layout.edges_per_node, self._searched
        return [] if kept is None else [n for n in range(space.nodes) if space.inputs + n > kept]

    def _kept_operation(
        self, cell: CellType, edge: int, arch: ArchParameters, accuracy: Accuracy
    ) -> int:
        """Returns the operation without which the accuracy is lowest."""
        space, weights = self._searched, self.forward_weights(arch)
        found: dict[int, float] = {}
        for k, name in enumerate(space.candidates(cell)[edge]):
            if name == "none" and not space.cell_layout.derives_none:
                continue
            masked = weights[cell].clone()
            masked[edge, k] = 0
            found[k] = accuracy({**weights, cell: masked})
        # `min` keeps the first of equal ones.
        return min(found, key=lambda k: found[k])

    def _dropped_edges(
        self, cell: CellType, node: int, arch: ArchParameters, accuracy: Accuracy
    ) -> list[int]:
        """Returns the edges into a node that it does not keep."""
        space, weights = self._searched, self.forward_weights(arch)
        found = {
            e: accuracy({**weights, cell: without_edges(weights[cell], [e])})
            for e, (_, target) in enumerate(space.edges)
            if target == space.inputs + node
        }
        # As in the released code each trial is without one edge alone, so one round ranks them.
        ranked = sorted(found, key=lambda e: (found[e], e), reverse=True)
        return ranked[: len(ranked) - (space.cell_layout.edges_per_node or 0)]


def without_edges(w: Tensor, edges: Sequence[int]) -> Tensor:
    """Returns weights [E, K] that are 0 on some edges."""
    kept = [0.0 if e in edges else 1.0 for e in range(len(w))]
    return w * torch.tensor(kept, dtype=w.dtype, device=w.device)[:, None]


def _drawn(items: Sequence[int]) -> int:
    """Draws one of them from the run's generator, the same in all processes."""
    return items[int(torch.randint(len(items), ()))]
