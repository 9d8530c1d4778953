"""Lays out P-DARTS: lists `cell_ops` and `m_ops`, switches, dropout behind the identity."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fastnas.benchmarks.layouts.darts import of_mixed_ops
from fastnas.benchmarks.layouts.operations import PRIMITIVES, Identity, operation
from fastnas.benchmarks.layouts.skeleton import (
    CellInputs,
    Layout,
    SearchNetwork,
    edges_of,
    logits,
)

Switches = Sequence[Sequence[bool]]


class MixedOp(nn.Module):
    def __init__(self, C: int, stride: int, switch: Sequence[bool], p: float) -> None:
        super().__init__()
        self.m_ops = nn.ModuleList()
        self.p = p
        for on, primitive in zip(switch, PRIMITIVES):
            if not on:
                continue
            op = operation(primitive, C, stride)
            if isinstance(op, Identity) and p > 0:
                op = nn.Sequential(op, nn.Dropout(self.p))
            self.m_ops.append(op)

    def update_p(self) -> None:
        for op in self.m_ops:
            if isinstance(op, nn.Sequential) and isinstance(op[0], Identity):
                op[1].p = self.p

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return sum(w * op(x) for w, op in zip(weights, self.m_ops))


class Cell(CellInputs):
    def __init__(self, nodes: int, switches: Switches, p: float, *sizes: int) -> None:
        super().__init__(*sizes)
        C, reduction = sizes[2:4]
        self._steps = self._multiplier = nodes
        self.cell_ops = nn.ModuleList()
        for i in range(nodes):
            for j in range(2 + i):
                stride = 2 if reduction and j < 2 else 1
                self.cell_ops.append(MixedOp(C, stride, switches[len(self.cell_ops)], p))

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        offset = 0
        for _ in range(self._steps):
            edges = self.cell_ops[offset : offset + len(states)]
            rows = weights[offset : offset + len(states)]
            offset += len(states)
            states.append(sum(op(h, row) for op, h, row in zip(edges, states, rows)))
        return torch.cat(states[-self._multiplier :], dim=1)


class Network(SearchNetwork):
    """Searches with as many candidates on each edge, but others on each, as a later stage does.

    Args:
        on: how many candidates an edge has.
        p: of the dropout behind each identity.
    """

    def __init__(self, C: int, layers: int, nodes: int, on: int = 8, p: float = 0.0) -> None:
        edges = edges_of(nodes)
        self.switches = [[(e + k) % 8 < on for k in range(8)] for e in range(edges)]
        super().__init__(partial(Cell, nodes, self.switches, p), C, layers, nodes)
        self.alphas_normal = logits(edges, on)
        self.alphas_reduce = logits(edges, on)

    def arch_parameters(self) -> list[Tensor]:
        return [self.alphas_normal, self.alphas_reduce]

    def forward(self, input: Tensor) -> Tensor:
        s0 = s1 = self.stem(input)
        for cell in self.cells:
            alphas = self.alphas_reduce if cell.reduction else self.alphas_normal
            weights = torch.softmax(alphas, dim=0 if alphas.size(1) == 1 else -1)
            s0, s1 = s1, cell(s0, s1, weights)
        return self.classify(s1)


def _candidates(network: Network) -> list[nn.Module]:
    """Returns the operations, the identities within their Sequentials among them."""
    ops = of_mixed_ops(network, "m_ops")
    return [next(m for m in op.modules() if m is not op) if _dropped(op) else op for op in ops]


def _dropped(op: nn.Module) -> bool:
    return isinstance(op, nn.Sequential) and isinstance(op[1], nn.Dropout)


LAYOUTS = (
    Layout("pdarts", Network, Network.arch_parameters, _candidates),
    Layout("pdarts-stage-2", partial(Network, on=5, p=0.4), Network.arch_parameters, _candidates),
)
