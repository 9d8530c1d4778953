"""Holds what the search networks of DARTS' kind share around their cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastnas.benchmarks.layouts.operations import FactorizedReduce, ReLUConvBN

CLASSES = 10


class Layout(NamedTuple):
    """Names a layout, and says how its network is built, called and counted.

    Args:
        name: of the code base, and of the variant where there are several.
        build: makes the network of (C, layers, nodes).
        alphas: returns its architecture parameters.
        candidates: returns the candidates that are operations of DARTS or of NAS-Bench-201.
        call: runs the network on images; it may need more than them.
        layers: what a benchmark builds; None: as it likes.
    """

    name: str
    build: Callable[[int, int, int], nn.Module]
    alphas: Callable[[Any], Iterable[Tensor]]
    candidates: Callable[[Any], Iterable[nn.Module]]
    call: Callable[[Any, Tensor], Tensor] = lambda network, x: network(x)
    layers: int | None = None


def edges_of(nodes: int) -> int:
    return sum(2 + i for i in range(nodes))


def logits(*shape: int) -> Tensor:
    """Draws architecture parameters that are plain tensors, no parameters of a module."""
    return (1e-3 * torch.randn(*shape)).requires_grad_()


class SearchNetwork(nn.Module):
    """Runs a stem, cells of two inputs each, and a classifier.

    Args:
        cell: makes a cell of (C_prev_prev, C_prev, C, reduction, reduction_prev).
    """

    def __init__(
        self,
        cell: Callable[[int, int, int, bool, bool], nn.Module],
        C: int,
        layers: int,
        nodes: int,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 3 * C, 3, padding=1, bias=False), nn.BatchNorm2d(3 * C)
        )
        C_prev_prev, C_prev, C_curr = 3 * C, 3 * C, C
        self.cells = nn.ModuleList()
        reduction_prev = False
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            C_curr *= 2 if reduction else 1
            self.cells.append(cell(C_prev_prev, C_prev, C_curr, reduction, reduction_prev))
            reduction_prev = reduction
            C_prev_prev, C_prev = C_prev, nodes * C_curr
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(C_prev, CLASSES)

    def classify(self, s1: Tensor) -> Tensor:
        out = self.global_pooling(s1)
        return self.classifier(out.view(out.size(0), -1))


class CellInputs(nn.Module):
    """Holds what prepares the two inputs of a cell, as every cell here but pt.darts' does."""

    def __init__(
        self, C_prev_prev: int, C_prev: int, C: int, reduction: bool, reduction_prev: bool
    ) -> None:
        super().__init__()
        self.reduction = reduction
        before = FactorizedReduce if reduction_prev else ReLUConvBN
        self.preprocess0 = before(C_prev_prev, C)
        self.preprocess1 = ReLUConvBN(C_prev, C)
