"""Lays out darts-pt: candidates of weight 0 are skipped; projected edges, and edges left out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnas.benchmarks.layouts import darts, robust_darts
from fastnas.benchmarks.layouts.skeleton import Layout


class MixedOp(robust_darts.MixedOp):
    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        # Without a weight left this is the number 0.
        return sum(w * op(x) for w, op in zip(weights, self._ops) if w != 0)


class Cell(robust_darts.Cell):
    mixed_op = MixedOp


class Network(robust_darts.Network):
    made_of = Cell


class ProjectedNetwork(Network):
    """Has chosen the candidate of every third edge, and taken one edge into each late node away."""

    def __init__(self, C: int, layers: int, nodes: int) -> None:
        super().__init__(C, layers, nodes)
        edges = len(self.alphas_normal)
        self.proj_weights = {
            e: torch.eye(self.candidates)[e % self.candidates] for e in range(0, edges, 3)
        }
        first = 2
        for node in range(1, nodes):
            self.proj_weights[first + node - 1] = torch.zeros(self.candidates)
            first += 2 + node

    def weights(self, cell: nn.Module) -> Tensor:
        weights = super().weights(cell)
        for e, chosen in self.proj_weights.items():
            weights[e].data.copy_(chosen)
        return weights


LAYOUTS = (
    Layout("darts-pt", Network, Network.arch_parameters, darts.of_mixed_ops),
    Layout("darts-pt-projection", ProjectedNetwork, Network.arch_parameters, darts.of_mixed_ops),
)
