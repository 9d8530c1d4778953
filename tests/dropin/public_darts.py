"""A search network in the layout of the public DARTS code, as a user has one: torch, no fastnas."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

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
WITHOUT_NONE = PRIMITIVES[1:]


class ReLUConvBN(nn.Module):
    def __init__(self, C_in, C_out):
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(inplace=False),
            nn.Conv2d(C_in, C_out, 1, stride=1, padding=0, bias=False),
            nn.BatchNorm2d(C_out, affine=False),
        )

    def forward(self, x):
        return self.op(x)


def separable(C, kernel, stride, padding, dilation):
    return (
        nn.ReLU(inplace=False),
        nn.Conv2d(C, C, kernel, stride, padding, dilation, groups=C, bias=False),
        nn.Conv2d(C, C, 1, bias=False),
        nn.BatchNorm2d(C, affine=False),
    )


class DilConv(nn.Module):
    def __init__(self, C, kernel, stride):
        super().__init__()
        self.op = nn.Sequential(*separable(C, kernel, stride, kernel - 1, 2))

    def forward(self, x):
        return self.op(x)


class SepConv(nn.Module):
    def __init__(self, C, kernel, stride):
        super().__init__()
        first = separable(C, kernel, stride, kernel // 2, 1)
        self.op = nn.Sequential(*first, *separable(C, kernel, 1, kernel // 2, 1))

    def forward(self, x):
        return self.op(x)


class Identity(nn.Module):
    def forward(self, x):
        return x


class Zero(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        if self.stride == 1:
            return x.mul(0.0)
        return x[:, :, :: self.stride, :: self.stride].mul(0.0)


class FactorizedReduce(nn.Module):
    def __init__(self, C_in, C_out):
        super().__init__()
        self.relu = nn.ReLU(inplace=False)
        self.conv_1 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, padding=0, bias=False)
        self.conv_2 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, padding=0, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=False)

    def forward(self, x):
        x = self.relu(x)
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1))


class NoisySkip(nn.Module):
    """The user's own noise: y + factor std(y) N(0, 1) in training, y a skip connection."""

    def __init__(self, skip, factor):
        super().__init__()
        self.skip = skip
        self.factor = factor

    def forward(self, x):
        y = self.skip(x)
        if self.training:
            y = y + self.factor * y.std().detach() * torch.randn_like(y)
        return y


def operation(name, C, stride, noise=None):
    if name == "none":
        return Zero(stride)
    if name == "skip_connect":
        skip = Identity() if stride == 1 else FactorizedReduce(C, C)
        return skip if noise is None else NoisySkip(skip, noise)
    if name.endswith("pool_3x3"):
        if name == "max_pool_3x3":
            pool = nn.MaxPool2d(3, stride=stride, padding=1)
        else:
            pool = nn.AvgPool2d(3, stride=stride, padding=1, count_include_pad=False)
        return nn.Sequential(pool, nn.BatchNorm2d(C, affine=False))
    kind = SepConv if name.startswith("sep") else DilConv
    return kind(C, int(name[-1]), stride)


class MixedOp(nn.Module):
    def __init__(self, C, stride, primitives=PRIMITIVES, noise=None):
        super().__init__()
        self._ops = nn.ModuleList(operation(name, C, stride, noise) for name in primitives)

    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self._ops))


class Cell(nn.Module):
    def __init__(
        self,
        steps,
        multiplier,
        C_prev_prev,
        C_prev,
        C,
        reduction,
        reduction_prev,
        primitives=PRIMITIVES,
        noise=None,
    ):
        super().__init__()
        self.reduction = reduction
        before = FactorizedReduce if reduction_prev else ReLUConvBN
        self.preprocess0 = before(C_prev_prev, C)
        self.preprocess1 = ReLUConvBN(C_prev, C)
        self._steps = steps
        self._multiplier = multiplier
        self._ops = nn.ModuleList()
        for i in range(steps):
            for j in range(2 + i):
                stride = 2 if reduction and j < 2 else 1
                self._ops.append(MixedOp(C, stride, primitives, noise))

    def forward(self, s0, s1, weights):
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        offset = 0
        for _ in range(self._steps):
            s = sum(self._ops[offset + j](h, weights[offset + j]) for j, h in enumerate(states))
            offset += len(states)
            states.append(s)
        return torch.cat(states[-self._multiplier :], dim=1)


class Network(nn.Module):
    """Search network with its own logits, which are no parameters of the module."""

    def __init__(
        self,
        C,
        num_classes,
        layers,
        criterion,
        steps=4,
        multiplier=4,
        stem_multiplier=3,
        primitives=PRIMITIVES,
        noise=None,
    ):
        super().__init__()
        self._criterion = criterion
        C_curr = stem_multiplier * C
        self.stem = nn.Sequential(
            nn.Conv2d(3, C_curr, 3, padding=1, bias=False), nn.BatchNorm2d(C_curr)
        )
        C_prev_prev, C_prev, C_curr = C_curr, C_curr, C
        self.cells = nn.ModuleList()
        reduction_prev = False
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            C_curr *= 2 if reduction else 1
            cell = Cell(
                steps,
                multiplier,
                C_prev_prev,
                C_prev,
                C_curr,
                reduction,
                reduction_prev,
                primitives,
                noise,
            )
            reduction_prev = reduction
            self.cells.append(cell)
            C_prev_prev, C_prev = C_prev, multiplier * C_curr
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(C_prev, num_classes)
        edges = sum(2 + i for i in range(steps))
        self.alphas_normal = (1e-3 * torch.randn(edges, len(primitives))).requires_grad_()
        self.alphas_reduce = (1e-3 * torch.randn(edges, len(primitives))).requires_grad_()
        self._arch_parameters = [self.alphas_normal, self.alphas_reduce]

    def forward(self, input):
        s0 = s1 = self.stem(input)
        for cell in self.cells:
            alphas = self.alphas_reduce if cell.reduction else self.alphas_normal
            s0, s1 = s1, cell(s0, s1, F.softmax(alphas, dim=-1))
        return self.classifier(self.global_pooling(s1).view(s1.size(0), -1))

    def _loss(self, input, target):
        return self._criterion(self(input), target)

    def arch_parameters(self):
        return self._arch_parameters
