"""Lays out SGAS: a tensor of logits per edge, edges that are decided and edges taken away."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnas.benchmarks.layouts import darts
from fastnas.benchmarks.layouts.operations import PRIMITIVES
from fastnas.benchmarks.layouts.skeleton import Layout, edges_of, logits

UNDECIDED, PRUNED = -1, PRIMITIVES.index("none")


class MixedOp(darts.MixedOp):
    def forward(self, x: Tensor, weights: Tensor | None, selected_idx: int | None = None) -> Tensor:
        if selected_idx is None:
            return sum(w * op(x) for w, op in zip(weights, self._ops))
        return self._ops[selected_idx](x)


class Cell(darts.Cell):
    mixed_op = MixedOp

    def forward(
        self, s0: Tensor, s1: Tensor, weights: list[Tensor], selected_idxs: Tensor
    ) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        offset = 0
        for _ in range(self._steps):
            o_list = []
            for j, h in enumerate(states):
                selected = selected_idxs[offset + j]
                if selected == UNDECIDED:
                    o_list.append(self._ops[offset + j](h, weights[offset + j]))
                elif selected != PRUNED:
                    o_list.append(self._ops[offset + j](h, None, selected))
            offset += len(states)
            states.append(sum(o_list))
        return torch.cat(states[-self._multiplier :], dim=1)


class Network(darts.Network):
    cell = Cell

    def __init__(self, C: int, layers: int, nodes: int) -> None:
        super().__init__(C, layers, nodes)
        edges = edges_of(nodes)
        self.alphas_normal = [logits(self.candidates) for _ in range(edges)]
        self.alphas_reduce = [logits(self.candidates) for _ in range(edges)]
        self._arch_parameters = [self.alphas_normal, self.alphas_reduce]
        self.normal_selected_idxs = torch.full((edges,), UNDECIDED)
        self.reduce_selected_idxs = torch.full((edges,), UNDECIDED)

    def arch_parameters(self) -> list[Tensor]:
        return self.alphas_normal + self.alphas_reduce

    def forward(self, input: Tensor) -> Tensor:
        s0 = s1 = self.stem(input)
        for cell in self.cells:
            reduction = cell.reduction
            selected = self.reduce_selected_idxs if reduction else self.normal_selected_idxs
            alphas = self.alphas_reduce if reduction else self.alphas_normal
            weights = [torch.softmax(row, dim=-1) for row in alphas]
            s0, s1 = s1, cell(s0, s1, weights, selected)
        return self.classify(s1)


def _decided(C: int, layers: int, nodes: int) -> nn.Module:
    """Builds a network in the middle of its search: one edge is decided, one is taken away."""
    network = Network(C, layers, nodes)
    network.normal_selected_idxs[1] = PRIMITIVES.index("sep_conv_3x3")
    network.normal_selected_idxs[3] = PRUNED
    network.reduce_selected_idxs[0] = PRIMITIVES.index("max_pool_3x3")
    network.reduce_selected_idxs[4] = PRIMITIVES.index("skip_connect")
    return network


LAYOUTS = (
    Layout("sgas", Network, Network.arch_parameters, darts.of_mixed_ops),
    Layout("sgas-decided", _decided, Network.arch_parameters, darts.of_mixed_ops),
)
