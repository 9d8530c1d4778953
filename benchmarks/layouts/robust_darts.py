"""Lays out RobustDARTS: candidates of each edge (S1 to S5), drop path on mixed ops, in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fastnas.benchmarks.layouts import darts
from fastnas.benchmarks.layouts.operations import PRIMITIVES, drop_path_, operation
from fastnas.benchmarks.layouts.skeleton import Layout

Space = Sequence[Sequence[str]]
PAIRS = (
    ("skip_connect", "dil_conv_5x5"),
    ("dil_conv_3x3", "dil_conv_5x5"),
    ("sep_conv_3x3", "max_pool_3x3"),
    ("skip_connect", "sep_conv_3x3"),
    ("avg_pool_3x3", "sep_conv_5x5"),
)
SPACES = {
    "S1": PAIRS,
    "S2": (("skip_connect", "sep_conv_3x3"),),
    "S3": (("none", "skip_connect", "sep_conv_3x3"),),
    "S4": (("noise", "sep_conv_3x3"),),
    "S5": (PRIMITIVES,),
}
"""The candidates of an edge, in turn."""


class NoiseOp(nn.Module):
    def __init__(self, stride: int, mean: float, std: float) -> None:
        super().__init__()
        self.stride = stride
        self.mean = mean
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        x_new = x[:, :, :: self.stride, :: self.stride] if self.stride != 1 else x
        return x_new.data.new(x_new.size()).normal_(self.mean, self.std)


class MixedOp(nn.Module):
    def __init__(self, C: int, stride: int, primitives: Sequence[str]) -> None:
        super().__init__()
        self._ops = nn.ModuleList(
            NoiseOp(stride, 0.0, 1.0) if name == "noise" else operation(name, C, stride)
            for name in primitives
        )

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return sum(w * op(x) for w, op in zip(weights, self._ops))


class Cell(darts.Cell):
    mixed_op = MixedOp

    def __init__(self, space: Space, nodes: int, *sizes: int) -> None:
        # The constructor of a module keeps plain settings that were made before it.
        self.primitives = space
        super().__init__(nodes, *sizes)

    def edge(self, C: int, stride: int) -> nn.Module:
        primitives = self.primitives[len(self._ops) % len(self.primitives)]
        return self.mixed_op(C, stride, primitives)

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor, drop_prob: float = 0.0) -> Tensor:
        s0 = self.preprocess0(s0)
        s1 = self.preprocess1(s1)
        states = [s0, s1]
        offset = 0
        for _ in range(self._steps):
            edges = range(offset, offset + len(states))
            terms = (self._ops[e](h, weights[e]) for e, h in zip(edges, states))
            if drop_prob > 0.0 and self.training:
                terms = (drop_path_(term, drop_prob) for term in terms)
            offset += len(states)
            states.append(sum(terms))
        return torch.cat(states[-self._multiplier :], dim=1)


class Network(darts.Network):
    """Searches one of the five spaces.

    Args:
        drop_path_prob: how likely a mixed op's output is dropped, of each image for itself.
    """

    made_of: type[nn.Module] = Cell

    def __init__(
        self, C: int, layers: int, nodes: int, space: str = "S5", drop_path_prob: float = 0.0
    ) -> None:
        self.cell = partial(self.made_of, SPACES[space])
        self.candidates = len(SPACES[space][0])
        super().__init__(C, layers, nodes)
        self.drop_path_prob = drop_path_prob

    def forward(self, input: Tensor) -> Tensor:
        s0 = s1 = self.stem(input)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, self.weights(cell), self.drop_path_prob)
        return self.classify(s1)


def _candidates(network: nn.Module) -> Iterator[nn.Module]:
    return (op for op in darts.of_mixed_ops(network) if not isinstance(op, NoiseOp))


LAYOUTS = tuple(
    Layout(name, partial(Network, **options), Network.arch_parameters, _candidates)
    for name, options in {
        "robust-darts": {},
        "robust-darts-S1-drop-path": {"space": "S1", "drop_path_prob": 0.3},
        "robust-darts-S3": {"space": "S3"},
        "robust-darts-S4": {"space": "S4"},
        "robust-darts-S5-drop-path": {"drop_path_prob": 0.2},
    }.items()
)
