"""Lays out FairDARTS: sigmoids of logits; in its darts folder a noisy skip, an epoch argument."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastnas.benchmarks.layouts import darts
from fastnas.benchmarks.layouts.operations import PRIMITIVES, operation
from fastnas.benchmarks.layouts.skeleton import Layout

WITHOUT_NONE = PRIMITIVES[1:]


class NoiseIdentity(nn.Module):
    """Adds noise that decays with the epoch, or with the calls that it counts."""

    def __init__(self, noise_type: str | None = "N", T_max: int = 50) -> None:
        super().__init__()
        self.noise_type = noise_type
        self.last_iter = 0
        self.T_max = T_max

    def forward(self, x: Tensor, step: int | None = None) -> Tensor:
        self.last_iter = self.last_iter + 1 if step is None else step
        if self.training and self.noise_type is not None:
            decay = (1 + math.cos(math.pi * self.last_iter / self.T_max)) / 2
            x = x + decay * torch.randn_like(x, requires_grad=False)
        return x


class NoisyMixedOp(nn.Module):
    def __init__(self, C: int, stride: int) -> None:
        super().__init__()
        self._ops = nn.ModuleList()
        self.use_noise_identity = stride == 1
        if self.use_noise_identity:
            self.noise_identity = NoiseIdentity()
        for primitive in WITHOUT_NONE:
            noisy = "skip" in primitive and self.use_noise_identity
            op = self.noise_identity if noisy else operation(primitive, C, stride)
            self._ops.append(op)

    def forward(self, x: Tensor, weights: Tensor, epoch: int | None = None) -> Tensor:
        return sum(
            w * self.noise_identity(x, epoch)
            if isinstance(op, NoiseIdentity) and self.training
            else w * op(x)
            for w, op in zip(weights, self._ops)
        )


class NoisyCell(darts.Cell):
    mixed_op = NoisyMixedOp

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor, epoch: int | None = None) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        offset = 0
        for _ in range(self._steps):
            s = sum(
                self._ops[offset + j](h, weights[offset + j], epoch) for j, h in enumerate(states)
            )
            offset += len(states)
            states.append(s)
        return torch.cat(states[-self._multiplier :], dim=1)


class NoisyNetwork(darts.Network):
    cell = NoisyCell
    candidates = len(WITHOUT_NONE)

    def forward(self, input: Tensor, epoch: int | None = None) -> Tensor:
        s0 = s1 = self.stem(input)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, self.weights(cell), epoch)
        return self.classify(s1)


class MixedOp(darts.MixedOp):
    def __init__(self, C: int, stride: int) -> None:
        super().__init__(C, stride, WITHOUT_NONE)


class Cell(darts.Cell):
    mixed_op = MixedOp


class Network(darts.Network):
    cell = Cell
    candidates = len(WITHOUT_NONE)

    def weights(self, cell: nn.Module) -> Tensor:
        return torch.sigmoid(self.alphas_reduce if cell.reduction else self.alphas_normal)


def _candidates(network: nn.Module) -> Iterator[nn.Module]:
    ops = darts.of_mixed_ops(network)
    return (op for op in ops if not isinstance(op, NoiseIdentity))


LAYOUTS = (
    Layout("fair-darts", Network, Network.arch_parameters, _candidates),
    Layout(
        "fair-darts-noise",
        NoisyNetwork,
        NoisyNetwork.arch_parameters,
        _candidates,
        lambda network, x: network(x, epoch=3),
    ),
    Layout("fair-darts-noise-counted", NoisyNetwork, NoisyNetwork.arch_parameters, _candidates),
)
