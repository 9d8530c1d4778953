"""Holds a search network as a user has one: like the public DARTS code, without reduction cells."""

import torch
from torch import nn


def relu_conv_bn(C_in, C, *depthwise):
    return nn.ReLU(), *depthwise, nn.Conv2d(C_in, C, 1, bias=False), nn.BatchNorm2d(C, affine=False)


def separable(C, kernel, times, dilation=1):
    pad = dilation * (kernel // 2)
    depthwise = (nn.Conv2d(C, C, kernel, 1, pad, dilation, C, bias=False) for _ in range(times))
    return nn.Sequential(*(layer for conv in depthwise for layer in relu_conv_bn(C, C, conv)))


def pool(kind, C):
    return nn.Sequential(kind(3, stride=1, padding=1), nn.BatchNorm2d(C, affine=False))


class MixedOp(nn.Module):
    def __init__(self, C):
        super().__init__()
        convs = [separable(C, kernel, 2) for kernel in (3, 5)]
        dilated = [separable(C, kernel, 1, dilation=2) for kernel in (3, 5)]
        self._ops = nn.ModuleList([pool(nn.MaxPool2d, C), nn.Identity(), *convs, *dilated])

    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self._ops))


class Cell(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.preprocess0 = nn.Sequential(*relu_conv_bn(4 * C, C))
        self.preprocess1 = nn.Sequential(*relu_conv_bn(4 * C, C))
        self._ops = nn.ModuleList(MixedOp(C) for _ in range(2 + 3 + 4 + 5))

    def forward(self, s0, s1, weights):
        states, edges = [self.preprocess0(s0), self.preprocess1(s1)], zip(self._ops, weights)
        for _ in range(4):
            states.append(sum(op(x, w) for x, (op, w) in zip(tuple(states), edges)))
        return torch.cat(states[-4:], 1)


class Network(nn.Module):
    def __init__(self, C=16, classes=10, layers=3):
        super().__init__()
        self.stem = nn.Conv2d(3, 4 * C, 3, padding=1, bias=False)
        self.cells = nn.ModuleList(Cell(C) for _ in range(layers))
        self.classifier = nn.Linear(4 * C, classes)
        self.alphas = nn.Parameter(1e-3 * torch.randn(2 + 3 + 4 + 5, 6))

    def forward(self, x):
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, self.alphas.softmax(-1))
        return self.classifier(s1.mean((2, 3)))
