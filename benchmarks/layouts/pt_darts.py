"""Lays out pt.darts: PoolBN, `net` Sequentials, SepConv of two DilConvs, edges in a list `dag`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnas.benchmarks.layouts.darts import of_mixed_ops
from fastnas.benchmarks.layouts.operations import PRIMITIVES, bare_pool
from fastnas.benchmarks.layouts.skeleton import CLASSES, Layout


class PoolBN(nn.Module):
    def __init__(self, name: str, C: int, stride: int) -> None:
        super().__init__()
        self.pool = bare_pool(name, stride)
        self.bn = nn.BatchNorm2d(C, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.pool(x))


class StdConv(nn.Module):
    def __init__(self, C_in: int, C_out: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C_in, C_out, 1, 1, 0, bias=False),
            nn.BatchNorm2d(C_out, affine=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class DilConv(nn.Module):
    def __init__(self, C: int, size: int, stride: int, dilation: int) -> None:
        super().__init__()
        padding = dilation * (size // 2)
        self.net = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C, C, size, stride, padding, dilation=dilation, groups=C, bias=False),
            nn.Conv2d(C, C, 1, stride=1, padding=0, bias=False),
            nn.BatchNorm2d(C, affine=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class SepConv(nn.Module):
    def __init__(self, C: int, size: int, stride: int) -> None:
        super().__init__()
        self.net = nn.Sequential(DilConv(C, size, stride, 1), DilConv(C, size, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Zero(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return x * 0.0
        return x[:, :, :: self.stride, :: self.stride] * 0.0


class FactorizedReduce(nn.Module):
    def __init__(self, C_in: int, C_out: int) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, padding=0, bias=False)
        self.conv2 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, padding=0, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        return self.bn(torch.cat([self.conv1(x), self.conv2(x[:, :, 1:, 1:])], dim=1))


def operation(name: str, C: int, stride: int) -> nn.Module:
    if name == "none":
        return Zero(stride)
    if name == "skip_connect":
        return Identity() if stride == 1 else FactorizedReduce(C, C)
    if "pool" in name:
        return PoolBN(name, C, stride)
    if name.startswith("sep"):
        return SepConv(C, int(name[-1]), stride)
    return DilConv(C, int(name[-1]), stride, 2)


class MixedOp(nn.Module):
    def __init__(self, C: int, stride: int) -> None:
        super().__init__()
        self._ops = nn.ModuleList(operation(name, C, stride) for name in PRIMITIVES)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return sum(w * op(x) for w, op in zip(weights, self._ops))


class SearchCell(nn.Module):
    def __init__(
        self, nodes: int, C_pp: int, C_p: int, C: int, reduction: bool, reduction_p: bool
    ) -> None:
        super().__init__()
        self.reduction = reduction
        self.preproc0 = FactorizedReduce(C_pp, C) if reduction_p else StdConv(C_pp, C)
        self.preproc1 = StdConv(C_p, C)
        self.dag = nn.ModuleList()
        for i in range(nodes):
            strides = [2 if reduction and j < 2 else 1 for j in range(2 + i)]
            self.dag.append(nn.ModuleList(MixedOp(C, stride) for stride in strides))

    def forward(self, s0: Tensor, s1: Tensor, w_dag: list[Tensor]) -> Tensor:
        states = [self.preproc0(s0), self.preproc1(s1)]
        for edges, w_list in zip(self.dag, w_dag):
            s_cur = sum(edges[i](s, w) for i, (s, w) in enumerate(zip(states, w_list)))
            states.append(s_cur)
        return torch.cat(states[2:], dim=1)


class SearchCNN(nn.Module):
    """Searches with logits that are parameters of the module, a ParameterList of nodes."""

    def __init__(self, C: int, layers: int, nodes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3 * C, 3, 1, 1, bias=False), nn.BatchNorm2d(3 * C))
        C_pp, C_p, C_cur = 3 * C, 3 * C, C
        self.cells = nn.ModuleList()
        reduction_p = False
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            C_cur *= 2 if reduction else 1
            self.cells.append(SearchCell(nodes, C_pp, C_p, C_cur, reduction, reduction_p))
            reduction_p = reduction
            C_pp, C_p = C_p, C_cur * nodes
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(C_p, CLASSES)
        rows = [(2 + i, len(PRIMITIVES)) for i in range(nodes)]
        self.alpha_normal = nn.ParameterList(nn.Parameter(1e-3 * torch.randn(*r)) for r in rows)
        self.alpha_reduce = nn.ParameterList(nn.Parameter(1e-3 * torch.randn(*r)) for r in rows)

    def forward(self, x: Tensor) -> Tensor:
        s0 = s1 = self.stem(x)
        normal = [torch.softmax(alpha, dim=-1) for alpha in self.alpha_normal]
        reduce = [torch.softmax(alpha, dim=-1) for alpha in self.alpha_reduce]
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, reduce if cell.reduction else normal)
        out = self.gap(s1)
        return self.linear(out.view(out.size(0), -1))

    def alphas(self) -> list[Tensor]:
        return [p for name, p in self.named_parameters() if "alpha" in name]


LAYOUTS = (Layout("pt.darts", SearchCNN, SearchCNN.alphas, of_mixed_ops),)
