"""Holds what methods share that run all candidates: the gradient's order."""

from __future__ import annotations

from torch import Tensor

from fastnas.bounds import whole
from fastnas.options import option
from fastnas.strategies.base import Strategy
from fastnas.strategies.hypergradient import unrolled
from fastnas.strategies.steps import ArchStep


class Mixture(Strategy):
    """Runs every candidate of every edge, weighed by a function of the logits."""

    order: int = option(1, "1: first order, 2: unrolled", whole(1, 2))

    def arch_gradient(self, step: ArchStep) -> tuple[list[Tensor], Tensor]:
        return unrolled(step) if self.order == 2 else super().arch_gradient(step)

    def not_capturable(self) -> str | None:
        if self.order == 2:
            return "order is 2; only the first-order step is captured"
        return super().not_capturable()
