"""Lays out DARTS-: an auxiliary skip beside the candidates, added in place, that decays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from fastnas.benchmarks.layouts import darts, robust_darts
from fastnas.benchmarks.layouts.operations import FactorizedReduce, Identity
from fastnas.benchmarks.layouts.skeleton import Layout


class DecayScheduler:
    def __init__(self) -> None:
        self.decay_rate = 0.7


beta_decay_scheduler = DecayScheduler()


class MixedOp(robust_darts.MixedOp):
    def __init__(self, C: int, stride: int, primitives: Sequence[str]) -> None:
        super().__init__(C, stride, primitives)
        self.stride = stride
        self.auxiliary_op = FactorizedReduce(C, C) if stride == 2 else Identity()

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        res = sum(w * op(x) for w, op in zip(weights, self._ops))
        res += self.auxiliary_op(x) * beta_decay_scheduler.decay_rate
        return res


class Cell(robust_darts.Cell):
    mixed_op = MixedOp


class Network(robust_darts.Network):
    made_of = Cell


def _candidates(network: nn.Module) -> Iterator[nn.Module]:
    yield from darts.of_mixed_ops(network)
    yield from (m.auxiliary_op for m in network.modules() if isinstance(m, MixedOp))


LAYOUTS = (Layout("darts-minus", Network, Network.arch_parameters, _candidates),)
