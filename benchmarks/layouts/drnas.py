"""Lays out DrNAS: weights from Dirichlet distributions, partial channels, candidates left out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Dirichlet
from torch.nn import functional as F

from fastnas.benchmarks.layouts import darts
from fastnas.benchmarks.layouts.operations import PRIMITIVES, operation
from fastnas.benchmarks.layouts.pc_darts import channel_shuffle
from fastnas.benchmarks.layouts.skeleton import Layout


def dirichlet_weights(alphas: Tensor, mask: Tensor | None) -> Tensor:
    """Draws the weights of each edge; of an edge with a mask, of its candidates that are left."""
    if mask is None:
        return Dirichlet(F.elu(alphas) + 1).rsample()
    matrix = torch.zeros_like(alphas)
    left = Dirichlet(F.elu(alphas[mask].reshape(len(alphas), -1)) + 1).rsample()
    matrix[mask] = left.reshape(-1)
    return matrix


class MixedOp(nn.Module):
    def __init__(self, C: int, stride: int, k: int) -> None:
        super().__init__()
        self.k = k
        self._ops = nn.ModuleList(operation(name, C // k, stride) for name in PRIMITIVES)
        self.mp = nn.MaxPool2d(2, 2)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        dim_2 = x.shape[1]
        xtemp = x[:, : dim_2 // self.k, :, :]
        xtemp2 = x[:, dim_2 // self.k :, :, :]
        temp1 = sum(w * op(xtemp) for w, op in zip(weights, self._ops) if w != 0)
        if self.k == 1:
            return temp1
        if temp1.shape[2] != x.shape[2]:
            xtemp2 = self.mp(xtemp2)
        return channel_shuffle(torch.cat([temp1, xtemp2], dim=1), self.k)


class Cell(darts.Cell):
    k = 4

    def edge(self, C: int, stride: int) -> nn.Module:
        return MixedOp(C, stride, self.k)


class WideCell(Cell):
    k = 1


class Network(darts.Network):
    cell = Cell

    def __init__(self, C: int, layers: int, nodes: int) -> None:
        super().__init__(C, layers, nodes)
        self.mask_normal = self.mask_reduce = None

    def forward(self, input: Tensor) -> Tensor:
        normal = dirichlet_weights(self.alphas_normal, self.mask_normal)
        reduce = dirichlet_weights(self.alphas_reduce, self.mask_reduce)
        s0 = s1 = self.stem(input)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, reduce if cell.reduction else normal)
        return self.classify(s1)

    def pruning(self, num_keep: int) -> None:
        """Keeps so many candidates on each edge."""
        masks = []
        for alphas in self._arch_parameters:
            kept = alphas.detach().topk(num_keep, dim=-1).indices
            masks.append(torch.zeros_like(alphas, dtype=torch.bool).scatter(1, kept, True))
        self.mask_normal, self.mask_reduce = masks


class WideNetwork(Network):
    cell = WideCell


def _pruned(C: int, layers: int, nodes: int) -> nn.Module:
    """Builds the network of the second stage: all channels, half of the candidates."""
    network = WideNetwork(C, layers, nodes)
    network.pruning(4)
    return network


LAYOUTS = (
    Layout("drnas", Network, Network.arch_parameters, darts.of_mixed_ops),
    Layout("drnas-pruned", _pruned, Network.arch_parameters, darts.of_mixed_ops),
)
