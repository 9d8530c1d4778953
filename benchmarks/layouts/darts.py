"""Lays out the first-order search network of quark0/darts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fastnas.benchmarks.layouts.operations import PRIMITIVES, operation
from fastnas.benchmarks.layouts.skeleton import (
    CellInputs,
    Layout,
    SearchNetwork,
    edges_of,
    logits,
)


class MixedOp(nn.Module):
    def __init__(self, C: int, stride: int, primitives: Sequence[str] = PRIMITIVES) -> None:
        super().__init__()
        self._ops = nn.ModuleList(operation(name, C, stride) for name in primitives)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return sum(w * op(x) for w, op in zip(weights, self._ops))


class Cell(CellInputs):
    """Sums mixed ops into nodes, in a ModuleList `_ops`."""

    mixed_op: type[nn.Module] = MixedOp

    def __init__(self, nodes: int, *sizes: int) -> None:
        super().__init__(*sizes)
        C, reduction = sizes[2:4]
        self._steps = self._multiplier = nodes
        self._ops = nn.ModuleList()
        for i in range(nodes):
            for j in range(2 + i):
                self._ops.append(self.edge(C, 2 if reduction and j < 2 else 1))

    def edge(self, C: int, stride: int) -> nn.Module:
        return self.mixed_op(C, stride)

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        s0 = self.preprocess0(s0)
        s1 = self.preprocess1(s1)
        states = [s0, s1]
        offset = 0
        for _ in range(self._steps):
            s = sum(self._ops[offset + j](h, weights[offset + j]) for j, h in enumerate(states))
            offset += len(states)
            states.append(s)
        return torch.cat(states[-self._multiplier :], dim=1)


class Network(SearchNetwork):
    cell: type[nn.Module] = Cell
    candidates = len(PRIMITIVES)

    def __init__(self, C: int, layers: int, nodes: int) -> None:
        super().__init__(partial(self.cell, nodes), C, layers, nodes)
        self.alphas_normal = logits(edges_of(nodes), self.candidates)
        self.alphas_reduce = logits(edges_of(nodes), self.candidates)
        self._arch_parameters = [self.alphas_normal, self.alphas_reduce]

    def arch_parameters(self) -> list[Tensor]:
        return self._arch_parameters

    def weights(self, cell: nn.Module) -> Tensor:
        alphas = self.alphas_reduce if cell.reduction else self.alphas_normal
        return torch.softmax(alphas, dim=-1)

    def forward(self, input: Tensor) -> Tensor:
        s0 = s1 = self.stem(input)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, self.weights(cell))
        return self.classify(s1)


class UnrolledNetwork(Network):
    """Makes a network of its kind and logits, for a step of the weights that is only looked at."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.sizes = sizes

    def new(self) -> UnrolledNetwork:
        made = UnrolledNetwork(*self.sizes).to(self.classifier.weight)
        for alphas, own in zip(made.arch_parameters(), self.arch_parameters()):
            alphas.data = own.data.clone()
        return made


def of_mixed_ops(network: nn.Module, name: str = "_ops") -> Iterator[nn.Module]:
    """Yields the modules in the lists of that name that hold no mixed ops."""
    for module in network.modules():
        for op in getattr(module, name, ()):
            if not hasattr(op, name):
                yield op


LAYOUTS = (Layout("darts", UnrolledNetwork, Network.arch_parameters, of_mixed_ops),)
