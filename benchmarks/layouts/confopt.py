"""Lays out confopt: OperationChoices in a list `ops`, convolutions wrapped for LoRA of rank 0."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from fastnas.benchmarks.layouts.operations import PRIMITIVES, Identity, Zero, bare_pool
from fastnas.benchmarks.layouts.skeleton import Layout, SearchNetwork, edges_of


class Conv2DLoRA(nn.Module):
    """Wraps a convolution, whose parameters it names a second time; rank 0 adds nothing."""

    def __init__(self, C_in: int, C_out: int, kernel_size: int, **options: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C_in, C_out, kernel_size, **options)
        self.kernel_size = kernel_size
        self.r = 0
        self.merged = False
        self.merge_weights = True
        self.weight = self.conv.weight
        self.bias = self.conv.bias

    def activate_lora(self, r: int, lora_alpha: int = 1) -> None:
        self.r = r
        C_out, C_in, size, _ = self.conv.weight.shape
        self.lora_A = nn.Parameter(0.1 * torch.randn(r * size, C_in * size).to(self.weight))
        self.lora_B = nn.Parameter(0.1 * torch.randn(C_out * size, r * size).to(self.weight))
        self.scaling = lora_alpha / r
        self.conv.weight.requires_grad = False

    def train(self, mode: bool = True) -> Conv2DLoRA:
        super().train(mode)
        if self.merge_weights and self.merged == mode:
            if self.r > 0:
                adapter = (self.lora_B @ self.lora_A).view(self.conv.weight.shape) * self.scaling
                self.conv.weight.data += -adapter if mode else adapter
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.r > 0 and not self.merged:
            adapter = (self.lora_B @ self.lora_A).view(self.conv.weight.shape) * self.scaling
            return self.conv._conv_forward(x, self.conv.weight + adapter, self.conv.bias)
        return self.conv(x)


class ReLUConvBN(nn.Module):
    def __init__(self, C_in: int, C_out: int) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(inplace=False),
            Conv2DLoRA(C_in, C_out, kernel_size=1, bias=False),
            nn.BatchNorm2d(C_out, affine=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


def half(C: int, size: int, stride: int, dilation: int = 1) -> list[nn.Module]:
    window = {"stride": stride, "padding": dilation * (size // 2), "dilation": dilation}
    return [
        nn.ReLU(inplace=False),
        Conv2DLoRA(C, C, kernel_size=size, groups=C, bias=False, **window),
        Conv2DLoRA(C, C, kernel_size=1, bias=False),
        nn.BatchNorm2d(C, affine=False),
    ]


class DilConv(nn.Module):
    def __init__(self, C: int, size: int, stride: int) -> None:
        super().__init__()
        self.op = nn.Sequential(*half(C, size, stride, dilation=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class SepConv(nn.Module):
    def __init__(self, C: int, size: int, stride: int) -> None:
        super().__init__()
        self.op = nn.Sequential(*half(C, size, stride), *half(C, size, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class FactorizedReduce(nn.Module):
    def __init__(self, C_in: int, C_out: int) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=False)
        self.conv_1 = Conv2DLoRA(C_in, C_out // 2, kernel_size=1, stride=2, bias=False)
        self.conv_2 = Conv2DLoRA(C_in, C_out // 2, kernel_size=1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1))


class Pooling(nn.Sequential):
    def __init__(self, name: str, C: int, stride: int) -> None:
        super().__init__(bare_pool(name, stride), nn.BatchNorm2d(C, affine=False))


def operation(name: str, C: int, stride: int) -> nn.Module:
    if name == "none":
        return Zero(stride)
    if name == "skip_connect":
        return Identity() if stride == 1 else FactorizedReduce(C, C)
    if "pool" in name:
        return Pooling(name, C, stride)
    return (SepConv if name.startswith("sep") else DilConv)(C, int(name[-1]), stride)


class OperationChoices(nn.Module):
    def __init__(self, ops: nn.ModuleList, is_reduction_cell: bool) -> None:
        super().__init__()
        self.ops = ops
        self.is_reduction_cell = is_reduction_cell

    def forward(self, x: Tensor, alphas: Tensor) -> Tensor:
        assert len(alphas) == len(self.ops)
        states = [op(x) * alpha for op, alpha in zip(self.ops, alphas)]
        return sum(states)


class Cell(nn.Module):
    def __init__(self, nodes: int, *sizes: int) -> None:
        super().__init__()
        C_prev_prev, C_prev, C, self.reduction, reduction_prev = sizes
        before = FactorizedReduce if reduction_prev else ReLUConvBN
        self.preprocess0 = before(C_prev_prev, C)
        self.preprocess1 = ReLUConvBN(C_prev, C)
        self._steps = self._multiplier = nodes
        self._ops = nn.ModuleList()
        for i in range(nodes):
            for j in range(2 + i):
                stride = 2 if self.reduction and j < 2 else 1
                ops = nn.ModuleList(operation(name, C, stride) for name in PRIMITIVES)
                self._ops.append(OperationChoices(ops, bool(self.reduction)))

    def forward(self, s0: Tensor, s1: Tensor, weights: list[Tensor]) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        offset = 0
        for _ in range(self._steps):
            s = sum(self._ops[offset + j](h, weights[offset + j]) for j, h in enumerate(states))
            offset += len(states)
            states.append(s)
        return torch.cat(states[-self._multiplier :], dim=1)


class Network(SearchNetwork):
    def __init__(self, C: int, layers: int, nodes: int) -> None:
        super().__init__(partial(Cell, nodes), C, layers, nodes)
        size = edges_of(nodes), len(PRIMITIVES)
        self.alphas_normal = nn.Parameter(1e-3 * torch.randn(*size))
        self.alphas_reduce = nn.Parameter(1e-3 * torch.randn(*size))

    def arch_parameters(self) -> list[Tensor]:
        return [self.alphas_normal, self.alphas_reduce]

    def forward(self, x: Tensor) -> Tensor:
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            alphas = self.alphas_reduce if cell.reduction else self.alphas_normal
            s0, s1 = s1, cell(s0, s1, torch.softmax(alphas, dim=-1))
        return self.classify(s1)


def _candidates(network: nn.Module) -> Iterator[nn.Module]:
    for module in network.modules():
        if isinstance(module, OperationChoices):
            yield from module.ops


LAYOUTS = (Layout("confopt", Network, Network.arch_parameters, _candidates),)
