"""Lays out SmoothDARTS: mixing weights themselves may be the leaves, moved against the loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnas.benchmarks.layouts import darts, robust_darts
from fastnas.benchmarks.layouts.skeleton import Layout


class Network(robust_darts.Network):
    def softmax_arch_parameters(self) -> None:
        """Puts the weights in the place of the logits, as its attack does before it moves them."""
        self._saved = [alphas.detach().clone() for alphas in self._arch_parameters]
        for alphas in self._arch_parameters:
            alphas.data = torch.softmax(alphas, dim=-1).data

    def restore_arch_parameters(self) -> None:
        for alphas, saved in zip(self._arch_parameters, self._saved):
            alphas.data.copy_(saved)

    def forward(self, input: Tensor, updateType: str = "alpha") -> Tensor:
        s0 = s1 = self.stem(input)
        for cell in self.cells:
            alphas = self.alphas_reduce if cell.reduction else self.alphas_normal
            weights = alphas if updateType == "weight" else self.weights(cell)
            s0, s1 = s1, cell(s0, s1, weights, self.drop_path_prob)
        return self.classify(s1)


def _attacked(network: nn.Module, x: Tensor) -> Tensor:
    return network(x, updateType="weight")


LAYOUTS = (Layout("smooth-darts", Network, Network.arch_parameters, darts.of_mixed_ops, _attacked),)
