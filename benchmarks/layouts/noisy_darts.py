"""Lays out NoisyDARTS' own code: bare pools, noise and drop path on the skip, a step argument."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastnas.benchmarks.layouts import darts
from fastnas.benchmarks.layouts.operations import PRIMITIVES, bare_pool, operation
from fastnas.benchmarks.layouts.skeleton import Layout

EPOCH = 7


class CosineDecay:
    def __init__(self, steps: int = 50) -> None:
        self.steps = steps
        self.last_iter = 0

    def rate(self, step: int) -> float:
        self.last_iter = step
        return (1 + math.cos(math.pi * step / self.steps)) / 2 if step <= self.steps else 0.0


class NoiseOp(nn.Module):
    def __init__(self, factor: float, mean: float = 0.0) -> None:
        super().__init__()
        self.factor = factor
        self.mean = mean
        self.decay_scheduler = CosineDecay()

    def forward(self, x: Tensor, step: int) -> Tensor:
        if not self.training:
            return x
        std = (x.std() * self.factor).detach()
        noise = torch.normal(self.mean + torch.zeros_like(x), std.expand_as(x))
        return x + noise * self.decay_scheduler.rate(step)


def drop_path(x: Tensor, drop_prob: float) -> Tensor:
    if drop_prob > 0.0:
        mask = x.new_empty(x.size(0), 1, 1, 1).bernoulli_(1 - drop_prob)
        x = x / (1 - drop_prob) * mask
    return x


class MixedOp(nn.Module):
    def __init__(self, C: int, stride: int, drop_prob: float = 0.3) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.noise_skip = NoiseOp(factor=0.2)
        self._ops = nn.ModuleList()
        for primitive in PRIMITIVES:
            if "max_pool" in primitive:
                self.bn1 = nn.BatchNorm2d(C, affine=False)
            if "avg_pool" in primitive:
                self.bn2 = nn.BatchNorm2d(C, affine=False)
            pool = "pool" in primitive
            op = bare_pool(primitive, stride) if pool else operation(primitive, C, stride)
            self._ops.append(op)

    def forward(self, x: Tensor, weights: Tensor, step: int) -> Tensor:
        terms = []
        for w, primitive, op in zip(weights, PRIMITIVES, self._ops):
            if "max_pool" in primitive:
                terms.append(w * self.bn1(op(x)))
            elif "avg_pool" in primitive:
                terms.append(w * self.bn2(op(x)))
            elif "skip" in primitive:
                terms.append(w * drop_path(self.noise_skip(op(x), step), self.drop_prob))
            else:
                terms.append(w * op(x))
        return sum(terms)


class Cell(darts.Cell):
    mixed_op = MixedOp

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor, epoch: int) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        offset = 0
        for _ in range(self._steps):
            s = sum(
                self._ops[offset + j](h, weights[offset + j], epoch) for j, h in enumerate(states)
            )
            offset += len(states)
            states.append(s)
        return torch.cat(states[-self._multiplier :], dim=1)


class Network(darts.Network):
    cell = Cell

    def forward(self, input: Tensor, epoch: int) -> Tensor:
        s0 = s1 = self.stem(input)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, self.weights(cell), epoch)
        return self.classify(s1)


def _candidates(network: Network) -> Iterator[nn.Module]:
    """Yields all candidates but the skips, to which the code adds noise by itself."""
    for module in network.modules():
        if isinstance(module, MixedOp):
            named = zip(PRIMITIVES, module._ops)
            yield from (op for primitive, op in named if primitive != "skip_connect")


LAYOUTS = (
    Layout(
        "noisy-darts",
        Network,
        Network.arch_parameters,
        _candidates,
        lambda network, x: network(x, EPOCH),
    ),
)
