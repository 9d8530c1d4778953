"""Lays out NAS-Bench-201 cells of xautodl, and of DrNAS with partial channels: a ModuleDict."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnas.benchmarks.layouts.drnas import dirichlet_weights
from fastnas.benchmarks.layouts.nb201_operations import NAS_BENCH_201, ReLUConvBN, operation
from fastnas.benchmarks.layouts.pc_darts import channel_shuffle
from fastnas.benchmarks.layouts.skeleton import CLASSES, Layout

NODES = 4


class NAS201SearchCell(nn.Module):
    def __init__(self, C: int, bias: bool = True) -> None:
        super().__init__()
        self.edges = nn.ModuleDict()
        for i in range(1, NODES):
            for j in range(i):
                ops = [operation(name, C, 1, bias) for name in NAS_BENCH_201]
                self.edges[f"{i}<-{j}"] = nn.ModuleList(ops)
        self.edge_keys = sorted(self.edges.keys())
        self.edge2index = {key: i for i, key in enumerate(self.edge_keys)}

    def forward(self, inputs: Tensor, weightss: Tensor) -> Tensor:
        nodes = [inputs]
        for i in range(1, NODES):
            inter_nodes = []
            for j in range(i):
                key = f"{i}<-{j}"
                weights = weightss[self.edge2index[key]]
                inter_nodes.append(
                    sum(layer(nodes[j]) * w for layer, w in zip(self.edges[key], weights))
                )
            nodes.append(sum(inter_nodes))
        return nodes[-1]


class PartialCell(NAS201SearchCell):
    """Mixes a part of the channels, as DrNAS' NAS201SearchCell_PartialChannel does."""

    def __init__(self, C: int, k: int = 4) -> None:
        super().__init__(C // k, bias=False)
        self.k = k

    def mixed_op(self, x: Tensor, ops: nn.ModuleList, weights: Tensor) -> Tensor:
        first = x.shape[1] // self.k
        mixed = sum(w * op(x[:, :first]) for w, op in zip(weights, ops) if w != 0)
        return channel_shuffle(torch.cat([mixed, x[:, first:]], dim=1), self.k)

    def forward(self, inputs: Tensor, weightss: Tensor) -> Tensor:
        nodes = [inputs]
        for i in range(1, NODES):
            keys = [f"{i}<-{j}" for j in range(i)]
            inter_nodes = [
                self.mixed_op(nodes[j], self.edges[key], weightss[self.edge2index[key]])
                for j, key in enumerate(keys)
            ]
            nodes.append(sum(inter_nodes))
        return nodes[-1]


class ResNetBasicblock(nn.Module):
    def __init__(self, C_in: int, C_out: int) -> None:
        super().__init__()
        self.conv_a = ReLUConvBN(C_in, C_out, 3, 2, bias=False)
        self.conv_b = ReLUConvBN(C_out, C_out, 3, 1, bias=False)
        self.downsample = nn.Sequential(
            nn.AvgPool2d(2, stride=2), nn.Conv2d(C_in, C_out, 1, bias=False)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return self.downsample(inputs) + self.conv_b(self.conv_a(inputs))


class TinyNetwork(nn.Module):
    """Searches in three stages of as many cells, with a residual block before the later two.

    Args:
        layers: cells, of all stages.
        dirichlet: whether weights are drawn, as DrNAS draws them.
    """

    def __init__(
        self,
        C: int,
        layers: int,
        nodes: int,
        cell: type[nn.Module] = NAS201SearchCell,
        dirichlet: bool = False,
    ) -> None:
        super().__init__()
        self.dirichlet = dirichlet
        self.stem = nn.Sequential(nn.Conv2d(3, C, 3, padding=1, bias=False), nn.BatchNorm2d(C))
        self.cells = nn.ModuleList()
        for stage in range(3):
            if stage:
                self.cells.append(ResNetBasicblock(C, 2 * C))
                C *= 2
            self.cells.extend(cell(C) for _ in range(max(1, layers // 3)))
        self.lastact = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(inplace=True))
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(C, CLASSES)
        edges = NODES * (NODES - 1) // 2
        self.arch_parameters = nn.Parameter(1e-3 * torch.randn(edges, len(NAS_BENCH_201)))

    def get_alphas(self) -> list[Tensor]:
        return [self.arch_parameters]

    def forward(self, inputs: Tensor) -> Tensor:
        if self.dirichlet:
            alphas = dirichlet_weights(self.arch_parameters, None)
        else:
            alphas = F.softmax(self.arch_parameters, dim=-1)
        feature = self.stem(inputs)
        for cell in self.cells:
            searched = isinstance(cell, NAS201SearchCell)
            feature = cell(feature, alphas) if searched else cell(feature)
        out = self.global_pooling(self.lastact(feature))
        return self.classifier(out.view(out.size(0), -1))


def _candidates(network: nn.Module) -> Iterator[nn.Module]:
    for module in network.modules():
        if isinstance(module, NAS201SearchCell):
            yield from (op for edge in module.edges.values() for op in edge)


LAYOUTS = (
    Layout("xautodl-nb201", TinyNetwork, TinyNetwork.get_alphas, _candidates, layers=15),
    Layout(
        "drnas-nb201",
        partial(TinyNetwork, cell=PartialCell, dirichlet=True),
        TinyNetwork.get_alphas,
        _candidates,
        layers=15,
    ),
)
