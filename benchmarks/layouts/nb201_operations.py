"""Holds the operations of NAS-Bench-201's authors: dense convolutions, pools without a norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnas.benchmarks.layouts.operations import bare_pool

NAS_BENCH_201 = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
DARTS_SPACE = (
    *("none", "skip_connect", "dua_sepc_3x3", "dua_sepc_5x5"),
    *("dil_sepc_3x3", "dil_sepc_5x5", "avg_pool_3x3", "max_pool_3x3"),
)


class ReLUConvBN(nn.Module):
    def __init__(self, C_in: int, C_out: int, size: int, stride: int, bias: bool) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(inplace=False),
            nn.Conv2d(C_in, C_out, (size, size), (stride, stride), size // 2, bias=bias),
            nn.BatchNorm2d(C_out, affine=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class SepConv(nn.Module):
    def __init__(self, C: int, size: int, stride: int, dilation: int, bias: bool) -> None:
        super().__init__()
        padding = dilation * (size // 2)
        self.op = nn.Sequential(
            nn.ReLU(inplace=False),
            nn.Conv2d(C, C, size, stride, padding, dilation, groups=C, bias=False),
            nn.Conv2d(C, C, 1, bias=bias),
            nn.BatchNorm2d(C, affine=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class DualSepConv(nn.Module):
    def __init__(self, C: int, size: int, stride: int, bias: bool) -> None:
        super().__init__()
        self.op_a = SepConv(C, size, stride, 1, bias)
        self.op_b = SepConv(C, size, 1, 1, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.op_a(x)
        return self.op_b(x)


class POOLING(nn.Module):
    def __init__(self, name: str, stride: int) -> None:
        super().__init__()
        self.preprocess = None
        self.op = bare_pool(name, stride)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.op(self.preprocess(inputs) if self.preprocess else inputs)


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Zero(nn.Module):
    def __init__(self, C_in: int, C_out: int, stride: int) -> None:
        super().__init__()
        self.C_in = C_in
        self.C_out = C_out
        self.stride = stride
        self.is_zero = True

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return x.mul(0.0)
        return x[:, :, :: self.stride, :: self.stride].mul(0.0)


class FactorizedReduce(nn.Module):
    """Halves an image of any size: the shifted half is padded first."""

    def __init__(self, C_in: int, C_out: int, bias: bool) -> None:
        super().__init__()
        self.stride = 2
        self.relu = nn.ReLU(inplace=False)
        halves = C_out // 2, C_out - C_out // 2
        self.convs = nn.ModuleList(nn.Conv2d(C_in, C, 1, stride=2, bias=bias) for C in halves)
        self.pad = nn.ConstantPad2d((0, 1, 0, 1), 0)
        self.bn = nn.BatchNorm2d(C_out, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        y = self.pad(x)
        return self.bn(torch.cat([self.convs[0](x), self.convs[1](y[:, :, 1:, 1:])], dim=1))


def operation(name: str, C: int, stride: int, bias: bool) -> nn.Module:
    """Builds an operation by its name.

    Args:
        bias: whether convolutions before a batch norm have one: xautodl's have it without scales.
    """
    size = int(name[-1]) if name[-1].isdigit() else 0
    if name == "none":
        return Zero(C, C, stride)
    if name == "skip_connect":
        return Identity() if stride == 1 else FactorizedReduce(C, C, bias)
    if name.startswith("nor_conv"):
        return ReLUConvBN(C, C, size, stride, bias)
    if name.startswith("dua_sepc"):
        return DualSepConv(C, size, stride, bias)
    if name.startswith("dil_sepc"):
        return SepConv(C, size, stride, 2, bias)
    return POOLING(name, stride)
