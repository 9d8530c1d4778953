"""Implements DARTS- (Chu et al., ICLR 2021, arXiv 2009.01027): an auxiliary skip that fades."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastnas import reference
from fastnas.bounds import Bounds
from fastnas.nn import ArchParameters
from fastnas.options import option
from fastnas.reference.amp import Amp
from fastnas.spaces import CellType, Space
from fastnas.strategies.scheduled import Scheduled
from fastnas.strategies.steps import Batch

DECAYS = ("linear", "cosine")
SKIP = "skip_connect"


@dataclass(frozen=True)
class WithAuxiliarySkip(Space):
    """Describes a network whose edges have one skip connection more than are searched."""

    def candidates(self, cell_type: CellType) -> tuple[tuple[str, ...], ...]:
        """Returns the candidates of every edge, the auxiliary skip last where it is one more."""
        names = super().candidates(cell_type)
        if self.folded(cell_type) is not None:
            return names
        return tuple((*edge, SKIP) for edge in names)

    def folded(self, cell_type: CellType) -> int | None:
        """Tells which candidate the auxiliary skip is on every edge, or None.

        At stride 1 both are the identity. At stride 2 each has parameters of its own.
        """
        names = super().candidates(cell_type)
        columns = {edge.index(SKIP) if SKIP in edge else None for edge in names}
        strides = {self.stride(cell_type, edge) for edge in self.edges}
        return columns.pop() if len(columns) == 1 and strides == {1} else None


class DARTSMinus(Scheduled):
    """Searches as DARTS, with a skip beside every mixture, whose weight falls from 1 to 0.

    obar(x) = sum_o softmax(alpha)_o o(x) + beta_e skip(x)
    beta_e  = auxiliary_skip (1 - e / E), or (1 + cos(pi e / E)) / 2 in place of (1 - e / E)

    As in the released code the skip is the identity at stride 1 and a factorized reduction of its
    own at stride 2, is there whether or not an edge has a skip among its candidates, and in eval
    mode as well. Where all edges of a cell type have stride 1 and the skip as a candidate, beta is
    added to the weight of that one, which is the same function; else each edge has one candidate
    more, which no logit weighs.
    """

    name = "darts-minus"
    source = "Chu et al., ICLR 2021, arXiv 2009.01027"
    figure = "auxiliary_skip"

    auxiliary_skip: float = option(
        1.0, "beta of the first epoch: weight of the auxiliary skip", Bounds(0, 1e6)
    )
    auxiliary_decay: str = option("linear", "how beta falls to 0", choices=DECAYS)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._network: WithAuxiliarySkip | None = None

    def level_of(self, epoch: int, epochs: int) -> float:
        done = epoch / epochs
        left = 1 - done if self.auxiliary_decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.auxiliary_skip * left

    def network_space(self, space: Space) -> Space:
        self._network = WithAuxiliarySkip(space.name, space.normal, space.reduce, space.layout)
        return self._network

    def forward_weights(self, arch: ArchParameters) -> dict[str, Tensor]:
        return self._with_skip(self.mixing_weights(arch))

    def validation_weights(self, arch: ArchParameters) -> dict[str, Tensor]:
        return self._with_skip(self.mixing_weights(arch))

    def _with_skip(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Adds beta to weights [E, K] of cell types, in a column of its own where it has one."""
        if self._network is None:
            raise RuntimeError(
                "darts-minus weighs a network of its network_space; ask for it first"
            )
        found: dict[str, Tensor] = {}
        for cell_type in self._network.cell_types:
            w, k = weights[cell_type], self._network.folded(cell_type)
            beta = self.current(w).expand(len(w), 1)
            parts = [w, beta] if k is None else [w[:, :k], w[:, k : k + 1] + beta, w[:, k + 1 :]]
            found[cell_type] = torch.cat(parts, 1)
        return found

    def eager_step(
        self,
        network: reference.SearchNetwork,
        arch: ArchParameters,
        optimizers: Sequence[torch.optim.Optimizer],
        train: Batch,
        valid: Batch,
        amp: Amp | None = None,
    ) -> None:
        params, alphas = optimizers
        reference.search_step(
            network, arch.alphas(), params, alphas, train, valid, amp=amp, beside=self._with_skip
        )
