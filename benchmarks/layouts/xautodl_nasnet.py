"""Lays out xautodl's NASNet cells: a ModuleDict of edges, own method names, biases, bare pools."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from fastnas.benchmarks.layouts.nb201_operations import (
    DARTS_SPACE,
    FactorizedReduce,
    ReLUConvBN,
    operation,
)
from fastnas.benchmarks.layouts.skeleton import Layout, SearchNetwork, edges_of


class MixedOp(nn.Module):
    """Has no `forward`: the cell calls the method of its search."""

    def __init__(self, C: int, stride: int) -> None:
        super().__init__()
        self._ops = nn.ModuleList(operation(name, C, stride, bias=True) for name in DARTS_SPACE)

    def forward_gdas(self, x: Tensor, weights: Tensor, index: int) -> Tensor:
        return self._ops[index](x) * weights[index]

    def forward_darts(self, x: Tensor, weights: Tensor) -> Tensor:
        return sum(w * op(x) for w, op in zip(weights, self._ops))


class NASNetSearchCell(nn.Module):
    def __init__(
        self,
        nodes: int,
        C_prev_prev: int,
        C_prev: int,
        C: int,
        reduction: bool,
        reduction_prev: bool,
    ) -> None:
        super().__init__()
        self.reduction = reduction
        if reduction_prev:
            self.preprocess0 = FactorizedReduce(C_prev_prev, C, bias=True)
        else:
            self.preprocess0 = ReLUConvBN(C_prev_prev, C, 1, 1, bias=True)
        self.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, bias=True)
        self._steps = self._multiplier = nodes
        self._ops = nn.ModuleList()
        self.edges = nn.ModuleDict()
        for i in range(nodes):
            for j in range(2 + i):
                self.edges[f"{i}<-{j}"] = MixedOp(C, 2 if reduction and j < 2 else 1)
        self.edge_keys = sorted(self.edges.keys())
        self.edge2index = {key: i for i, key in enumerate(self.edge_keys)}

    def forward_gdas(self, s0: Tensor, s1: Tensor, weightss: Tensor, indexs: Tensor) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for i in range(self._steps):
            clist = []
            for j, h in enumerate(states):
                e = self.edge2index[f"{i}<-{j}"]
                op = self.edges[f"{i}<-{j}"]
                clist.append(op.forward_gdas(h, weightss[e], indexs[e].item()))
            states.append(sum(clist))
        return torch.cat(states[-self._multiplier :], dim=1)

    def forward_darts(self, s0: Tensor, s1: Tensor, weightss: Tensor) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for i in range(self._steps):
            clist = []
            for j, h in enumerate(states):
                op = self.edges[f"{i}<-{j}"]
                clist.append(op.forward_darts(h, weightss[self.edge2index[f"{i}<-{j}"]]))
            states.append(sum(clist))
        return torch.cat(states[-self._multiplier :], dim=1)


class NASNetworkDARTS(SearchNetwork):
    def __init__(self, C: int, layers: int, nodes: int) -> None:
        super().__init__(partial(NASNetSearchCell, nodes), C, layers, nodes)
        last = self.classifier.in_features
        self.lastact = nn.Sequential(nn.BatchNorm2d(last), nn.ReLU(inplace=True))
        size = edges_of(nodes), len(DARTS_SPACE)
        self.arch_normal_parameters = nn.Parameter(1e-3 * torch.randn(*size))
        self.arch_reduce_parameters = nn.Parameter(1e-3 * torch.randn(*size))

    def get_alphas(self) -> list[Tensor]:
        return [self.arch_normal_parameters, self.arch_reduce_parameters]

    def forward(self, inputs: Tensor) -> Tensor:
        normal = torch.softmax(self.arch_normal_parameters, dim=1)
        reduce = torch.softmax(self.arch_reduce_parameters, dim=1)
        s0 = s1 = self.stem(inputs)
        for cell in self.cells:
            s0, s1 = s1, cell.forward_darts(s0, s1, reduce if cell.reduction else normal)
        return self.classify(self.lastact(s1))


class NASNetworkGDAS(NASNetworkDARTS):
    """Runs the one candidate of each edge that a Gumbel softmax draws."""

    def forward(self, inputs: Tensor) -> Tensor:
        weights, indices = {}, {}
        for reduction, alphas in enumerate(self.get_alphas()):
            gumbels = -torch.empty_like(alphas).exponential_().log()
            soft = ((alphas.log_softmax(dim=1) + gumbels) / 10).softmax(dim=1)
            index = soft.max(-1, keepdim=True)[1]
            hard = torch.zeros_like(soft).scatter_(-1, index, 1.0)
            weights[reduction], indices[reduction] = hard - soft.detach() + soft, index
        s0 = s1 = self.stem(inputs)
        for cell in self.cells:
            which = int(cell.reduction)
            s0, s1 = s1, cell.forward_gdas(s0, s1, weights[which], indices[which])
        return self.classify(self.lastact(s1))


def _candidates(network: nn.Module) -> Iterator[nn.Module]:
    for module in network.modules():
        if isinstance(module, MixedOp):
            yield from module._ops


LAYOUTS = (
    Layout("xautodl-nasnet", NASNetworkDARTS, NASNetworkDARTS.get_alphas, _candidates),
    Layout("xautodl-nasnet-gdas", NASNetworkGDAS, NASNetworkGDAS.get_alphas, _candidates),
)
