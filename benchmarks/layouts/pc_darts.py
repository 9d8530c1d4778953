"""Lays out PC-DARTS: a quarter of the channels, shuffled with the rest; weights of edges."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnas.benchmarks.layouts import darts
from fastnas.benchmarks.layouts.operations import PRIMITIVES, operation
from fastnas.benchmarks.layouts.skeleton import Layout, edges_of, logits

K = 4


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    N, C, H, W = x.data.size()
    x = x.view(N, groups, C // groups, H, W)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(N, -1, H, W)


class MixedOp(nn.Module):
    def __init__(self, C: int, stride: int) -> None:
        super().__init__()
        self._ops = nn.ModuleList(operation(name, C // K, stride) for name in PRIMITIVES)
        self.mp = nn.MaxPool2d(2, 2)
        self.k = K

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        first = x.shape[1] // self.k
        some, rest = x[:, :first, :, :], x[:, first:, :, :]
        mixed = sum(w * op(some) for w, op in zip(weights, self._ops))
        # A reduction pools what goes by.
        if mixed.shape[2] != x.shape[2]:
            rest = self.mp(rest)
        return channel_shuffle(torch.cat([mixed, rest], dim=1), self.k)


class Cell(darts.Cell):
    mixed_op = MixedOp

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor, weights2: Tensor) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        offset = 0
        for _ in range(self._steps):
            s = sum(
                weights2[offset + j] * self._ops[offset + j](h, weights[offset + j])
                for j, h in enumerate(states)
            )
            offset += len(states)
            states.append(s)
        return torch.cat(states[-self._multiplier :], dim=1)


class Network(darts.Network):
    cell = Cell

    def __init__(self, C: int, layers: int, nodes: int) -> None:
        super().__init__(C, layers, nodes)
        self.betas_normal = logits(edges_of(nodes))
        self.betas_reduce = logits(edges_of(nodes))
        self._arch_parameters += [self.betas_normal, self.betas_reduce]
        self._steps = nodes

    def edge_weights(self, betas: Tensor) -> Tensor:
        """Returns a softmax for each node, over the edges into it."""
        sizes = [2 + i for i in range(self._steps)]
        return torch.cat([torch.softmax(part, dim=-1) for part in betas.split(sizes)])

    def forward(self, input: Tensor) -> Tensor:
        s0 = s1 = self.stem(input)
        for cell in self.cells:
            betas = self.betas_reduce if cell.reduction else self.betas_normal
            s0, s1 = s1, cell(s0, s1, self.weights(cell), self.edge_weights(betas))
        return self.classify(s1)


LAYOUTS = (Layout("pc-darts", Network, Network.arch_parameters, darts.of_mixed_ops),)
