"""Holds the operations of DARTS as most public code lays them out: `op` Sequentials, no scales."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)


class ReLUConvBN(nn.Module):
    def __init__(self, C_in: int, C_out: int) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(inplace=False),
            nn.Conv2d(C_in, C_out, 1, bias=False),
            nn.BatchNorm2d(C_out, affine=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


def depthwise_separable(C: int, size: int, stride: int, dilation: int = 1) -> list[nn.Module]:
    padding = dilation * (size // 2)
    return [
        nn.ReLU(inplace=False),
        nn.Conv2d(C, C, size, stride, padding, dilation, groups=C, bias=False),
        nn.Conv2d(C, C, 1, bias=False),
        nn.BatchNorm2d(C, affine=False),
    ]


class DilConv(nn.Module):
    def __init__(self, C: int, size: int, stride: int) -> None:
        super().__init__()
        self.op = nn.Sequential(*depthwise_separable(C, size, stride, dilation=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class SepConv(nn.Module):
    def __init__(self, C: int, size: int, stride: int) -> None:
        super().__init__()
        first, second = depthwise_separable(C, size, stride), depthwise_separable(C, size, 1)
        self.op = nn.Sequential(*first, *second)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Zero(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return x.mul(0.0)
        return x[:, :, :: self.stride, :: self.stride].mul(0.0)


class FactorizedReduce(nn.Module):
    def __init__(self, C_in: int, C_out: int) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=False)
        self.conv_1 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1))


def bare_pool(name: str, stride: int) -> nn.Module:
    if name == "max_pool_3x3":
        return nn.MaxPool2d(3, stride=stride, padding=1)
    return nn.AvgPool2d(3, stride=stride, padding=1, count_include_pad=False)


def operation(name: str, C: int, stride: int) -> nn.Module:
    """Builds an operation by its name; pools with their batch norm behind them."""
    if name == "none":
        return Zero(stride)
    if name == "skip_connect":
        return Identity() if stride == 1 else FactorizedReduce(C, C)
    if "pool" in name:
        return nn.Sequential(bare_pool(name, stride), nn.BatchNorm2d(C, affine=False))
    return (SepConv if name.startswith("sep") else DilConv)(C, int(name[-1]), stride)


def drop_path_(x: Tensor, drop_prob: float) -> Tensor:
    """Drops whole samples of x, in place, and scales the others: as most public code does it."""
    if drop_prob > 0.0:
        keep_prob = 1.0 - drop_prob
        mask = torch.empty(x.size(0), 1, 1, 1, dtype=x.dtype, device=x.device)
        mask.bernoulli_(keep_prob)
        x.div_(keep_prob)
        x.mul_(mask)
    return x
