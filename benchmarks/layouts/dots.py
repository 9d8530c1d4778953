"""Lays out DOTS: groups of candidates first, then weights of pairs of edges over what was kept."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor, nn

from fastnas.benchmarks.layouts import darts
from fastnas.benchmarks.layouts.operations import PRIMITIVES
from fastnas.benchmarks.layouts.skeleton import Layout, SearchNetwork, edges_of, logits

FREE = 4
"""How many of the candidates, the first, have no parameters."""


class MixedOp(darts.MixedOp):
    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return sum(w * op(x) for w, op in zip(weights, self._ops) if w != 0)


class Cell(darts.Cell):
    mixed_op = MixedOp

    def forward(
        self, s0: Tensor, s1: Tensor, weights: Tensor, weights_edge: Tensor | None
    ) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        offset = pair = 0
        for _ in range(self._steps):
            edges = list(range(offset, offset + len(states)))
            terms = (self._ops[e](h, weights[e]) for e, h in zip(edges, states))
            if weights_edge is not None:
                pairs = list(combinations(range(len(states)), 2))
                scale = torch.zeros(len(states), device=s0.device, dtype=weights_edge.dtype)
                for w, (a, b) in zip(weights_edge[pair : pair + len(pairs)], pairs):
                    scale[a] += w
                    scale[b] += w
                pair += len(pairs)
                terms = (scale[j] * term for j, term in enumerate(terms))
            offset += len(states)
            states.append(sum(terms))
        return torch.cat(states[-self._multiplier :], dim=1)


class Network(SearchNetwork):
    def __init__(self, C: int, layers: int, nodes: int) -> None:
        def cell(*sizes: int) -> nn.Module:
            return Cell(nodes, *sizes)

        super().__init__(cell, C, layers, nodes)
        self._steps = nodes
        last = self.classifier.in_features
        self.lastact = nn.Sequential(nn.BatchNorm2d(last), nn.ReLU(inplace=True))
        edges = edges_of(nodes)
        self._arch_parameters = [logits(edges, FREE) for _ in range(4)]

    def arch_parameters(self) -> list[Tensor]:
        return self._arch_parameters

    def run(
        self, input: Tensor, normal: Tensor, reduce: Tensor, edges: tuple[Tensor | None, ...]
    ) -> Tensor:
        s0 = s1 = self.stem(input)
        for cell in self.cells:
            weights = reduce if cell.reduction else normal
            s0, s1 = s1, cell(s0, s1, weights, edges[cell.reduction])
        return self.classify(self.lastact(s1))

    def forward(self, input: Tensor) -> Tensor:
        normal_free, normal, reduce_free, reduce = (
            torch.softmax(alphas, dim=-1) for alphas in self._arch_parameters
        )
        normal = torch.cat([normal_free, normal], -1)
        reduce = torch.cat([reduce_free, reduce], -1)
        return self.run(input, normal, reduce, (None, None))

    def prune_model(self) -> None:
        """Keeps the best candidate of each group on each edge, as between the two phases."""
        masks = []
        for free, other in (self._arch_parameters[:2], self._arch_parameters[2:]):
            mask = torch.zeros(len(free), len(PRIMITIVES))
            rows = torch.arange(len(free))
            mask[rows, free.argmax(-1)] = 1
            mask[rows, FREE + other.argmax(-1)] = 1
            masks.append(mask)
        self.bool_mask_normal, self.bool_mask_reduce = masks
        pairs = sum(len(list(combinations(range(2 + i), 2))) for i in range(self._steps))
        balance = [logits(len(masks[0]), 2) for _ in range(2)]
        self._arch_parameters = [*balance, logits(pairs), logits(pairs)]

    def forward_tp(self, input: Tensor) -> Tensor:
        masks = self.bool_mask_normal, self.bool_mask_reduce
        weights = []
        for mask, balance in zip(masks, self._arch_parameters[:2]):
            share = torch.softmax(balance, dim=-1)
            mixed = torch.zeros(mask.shape).to(share)
            mixed[:, :FREE] = mask[:, :FREE] * share[:, :1]
            mixed[:, FREE:] = mask[:, FREE:] * share[:, 1:]
            weights.append(mixed)
        sizes = [len(list(combinations(range(2 + i), 2))) for i in range(self._steps)]
        edges = tuple(
            torch.cat([torch.softmax(part, dim=-1) for part in betas.split(sizes)])
            for betas in self._arch_parameters[2:]
        )
        return self.run(input, *weights, edges)


def _pruned(C: int, layers: int, nodes: int) -> nn.Module:
    network = Network(C, layers, nodes)
    network.prune_model()
    return network


LAYOUTS = (
    Layout("dots", Network, Network.arch_parameters, darts.of_mixed_ops),
    Layout(
        "dots-topology", _pruned, Network.arch_parameters, darts.of_mixed_ops, Network.forward_tp
    ),
)
