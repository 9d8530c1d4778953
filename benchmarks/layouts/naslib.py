"""Lays out NASLib: children `primitive-0` and on, called with (x, None), alphas in edge data."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from fastnas.benchmarks.layouts.operations import (
    PRIMITIVES,
    bare_pool,
    depthwise_separable,
)
from fastnas.benchmarks.layouts.skeleton import (
    CellInputs,
    Layout,
    SearchNetwork,
    edges_of,
)

EdgeData = SimpleNamespace


class Identity(nn.Module):
    def forward(self, x: Tensor, edge_data: EdgeData | None) -> Tensor:
        return x


class Zero(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor, edge_data: EdgeData | None = None) -> Tensor:
        if self.stride == 1:
            return x.mul(0.0)
        return x[:, :, :: self.stride, :: self.stride].mul(0.0)


class SepConv(nn.Module):
    def __init__(self, C: int, size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size = size
        first, second = depthwise_separable(C, size, stride), depthwise_separable(C, size, 1)
        self.op = nn.Sequential(*first, *second)

    def forward(self, x: Tensor, edge_data: EdgeData | None) -> Tensor:
        return self.op(x)


class DilConv(nn.Module):
    def __init__(self, C: int, size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size = size
        self.op = nn.Sequential(*depthwise_separable(C, size, stride, dilation=2))

    def forward(self, x: Tensor, edge_data: EdgeData | None) -> Tensor:
        return self.op(x)


class MaxPool(nn.Module):
    def __init__(self, C: int, stride: int) -> None:
        super().__init__()
        pool, norm = bare_pool("max_pool_3x3", stride), nn.BatchNorm2d(C, affine=False)
        self.maxpool = nn.Sequential(pool, norm)

    def forward(self, x: Tensor, edge_data: EdgeData | None) -> Tensor:
        return self.maxpool(x)


class AvgPool(nn.Module):
    def __init__(self, C: int, stride: int) -> None:
        super().__init__()
        pool, norm = bare_pool("avg_pool_3x3", stride), nn.BatchNorm2d(C, affine=False)
        self.avgpool = nn.Sequential(pool, norm)

    def forward(self, x: Tensor, edge_data: EdgeData | None) -> Tensor:
        return self.avgpool(x)


class FactorizedReduce(nn.Module):
    def __init__(self, C: int) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=False)
        self.conv_1 = nn.Conv2d(C, C // 2, 1, stride=2, padding=0, bias=False)
        self.conv_2 = nn.Conv2d(C, C // 2, 1, stride=2, padding=0, bias=False)
        self.bn = nn.BatchNorm2d(C, affine=False)

    def forward(self, x: Tensor, edge_data: EdgeData | None) -> Tensor:
        x = self.relu(x)
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1))


def primitive(name: str, C: int, stride: int) -> nn.Module:
    if name == "none":
        return Zero(stride)
    if name == "skip_connect":
        return Identity() if stride == 1 else FactorizedReduce(C)
    if "pool" in name:
        return (MaxPool if name.startswith("max") else AvgPool)(C, stride)
    return (SepConv if name.startswith("sep") else DilConv)(C, int(name[-1]), stride)


class DARTSMixedOp(nn.Module):
    """Keeps its primitives in a plain list as well; alphas come with the data of the edge."""

    def __init__(self, primitives: list[nn.Module]) -> None:
        super().__init__()
        self.primitives = primitives
        for i, op in enumerate(primitives):
            self.add_module(f"primitive-{i}", op)

    def get_weights(self, edge_data: EdgeData) -> Tensor:
        return edge_data.alpha

    def process_weights(self, weights: Tensor) -> Tensor:
        return torch.softmax(weights, dim=-1)

    def apply_weights(self, x: Tensor, weights: Tensor) -> Tensor:
        return sum(w * op(x, None) for w, op in zip(weights, self.primitives))

    def forward(self, x: Tensor, edge_data: EdgeData) -> Tensor:
        weights = self.process_weights(self.get_weights(edge_data))
        return self.apply_weights(x, weights)


class Graph(CellInputs):
    """Runs the edges of a graph, children `Edge(a,b)`, in the order of their targets."""

    def __init__(self, nodes: int, *sizes: int) -> None:
        super().__init__(*sizes)
        C, reduction = sizes[2:4]
        self.nodes = nodes
        for i in range(nodes):
            for j in range(2 + i):
                stride = 2 if reduction and j < 2 else 1
                op = DARTSMixedOp([primitive(name, C, stride) for name in PRIMITIVES])
                self.add_module(f"Edge({j},{2 + i})", op)

    def forward(self, s0: Tensor, s1: Tensor, edges: list[EdgeData]) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        data = iter(edges)
        for i in range(self.nodes):
            inputs = [
                self._modules[f"Edge({j},{2 + i})"](x, next(data)) for j, x in enumerate(states)
            ]
            states.append(sum(inputs))
        return torch.cat(states[2:], dim=1)


class Network(SearchNetwork):
    def __init__(self, C: int, layers: int, nodes: int) -> None:
        super().__init__(partial(Graph, nodes), C, layers, nodes)
        self.architectural_weights = nn.ParameterList(
            nn.Parameter(1e-3 * torch.randn(len(PRIMITIVES))) for _ in range(2 * edges_of(nodes))
        )

    def alphas(self) -> list[Tensor]:
        return list(self.architectural_weights)

    def forward(self, x: Tensor) -> Tensor:
        data = [EdgeData(alpha=alpha) for alpha in self.architectural_weights]
        half = len(data) // 2
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, data[half:] if cell.reduction else data[:half])
        return self.classify(s1)


def _candidates(network: nn.Module) -> Iterator[nn.Module]:
    for module in network.modules():
        yield from getattr(module, "primitives", ())


LAYOUTS = (Layout("naslib", Network, Network.alphas, _candidates),)
