"""Holds sampled paths: instead of weights for all candidates, the one that each edge runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastnas.checks import check_flag, check_type
from fastnas.reference.arguments import check_floating


class Paths(NamedTuple):
    """y_j = sum_{e into j} w_e o_{k_e}(x_e) on one path or several through cells of a type.

    Of one edge (`MixedOp`) all shapes lack their last axis.
    """

    choice: Tensor
    """int64 [E] or [paths, E]: the candidate that an edge runs, -1: the edge is not there."""
    weight: Tensor
    """Of choice's shape: its straight-through value."""
    siblings: bool = False
    """Whether each edge adds 1 - w_e, which is 0: h sums to 1, so this is what the NAS-Bench-201
    code of GDAS adds, sum_{o != k} h_o, and lets the gradient of a node reach the candidates that
    were not sampled."""

    @property
    def number(self) -> int | None:
        """Returns the number of paths, None where choice has no such axis."""
        return self.choice.shape[0] if self.choice.dim() == 2 else None

    def rows(self) -> list[tuple[list[int], Tensor]]:
        """Returns, path by path, the choices, read on the host, and the weights [E]."""
        edges = self.choice.shape[-1]
        choices = self.choice.reshape(-1, edges).tolist()
        return list(zip(choices, self.weight.reshape(-1, edges).unbind()))

    def node(self, edges: slice) -> Paths:
        """Returns the paths of the edges into one node."""
        return Paths(self.choice[..., edges], self.weight[..., edges], self.siblings)

    def as_edge(self) -> Paths:
        """Returns the paths of one edge, as a cell with one edge takes them."""
        return Paths(self.choice[..., None], self.weight[..., None], self.siblings)


CellWeights = Tensor | Paths
Weights = Mapping[str, CellWeights]
"""Cell type ("normal", "reduce") to mixing weights [E, K] or sampled paths."""


def check_paths(name: str, w: Paths, edges: int) -> None:
    """Refuses choice and weight that are not [edges] or [paths, edges]."""
    check_type(f"{name}.choice", w.choice, Tensor)
    check_flag(f"{name}.siblings", w.siblings)
    shape = list(w.choice.shape)
    if w.choice.dtype != torch.int64:
        raise TypeError(f"{name}.choice is {w.choice.dtype}; torch.int64 is needed")
    if w.choice.dim() not in (1, 2) or shape[-1] != edges or 0 in shape:
        raise ValueError(
            f"{name}.choice has shape {shape}; [{edges}] or [paths, {edges}] is needed"
        )
    if w.choice.is_meta:
        raise ValueError(f"{name}.choice is on the meta device; its values are needed")
    check_floating(f"{name}.weight", w.weight)
    if w.weight.shape != w.choice.shape:
        given = list(w.weight.shape)
        raise ValueError(f"{name}.weight has shape {given}; that of choice, {shape}, is needed")


def number_of_paths(who: str, weights: Mapping[str, CellWeights]) -> int | None:
    """Returns the number that all cell types share; None for mixing weights, or no such axis."""
    counts = {t: w.number if isinstance(w, Paths) else None for t, w in weights.items()}
    if len(set(counts.values())) > 1:
        given = ", ".join(f"{t} {count or 'no paths axis'}" for t, count in counts.items())
        raise ValueError(f"{who}: the cell types differ in their number of paths: {given}")
    return next(iter(counts.values()))


class _AddZero(torch.autograd.Function):
    """y + zero = y: nothing is computed, and nothing more is held."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, zero: Tensor) -> Tensor:
        ctx.dtype = zero.dtype
        # This is a view, since a node is large and its value stays what it is.
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        # dL/d(zero) is the sum of dy over the whole node: in bfloat16 it would lose all but its
        # first digits.
        wide = torch.promote_types(dy.dtype, ctx.dtype)
        return dy, dy.sum(dtype=wide).to(ctx.dtype) if ctx.needs_input_grad[1] else None


def add_siblings(y: Tensor, weight: Tensor, choice: Tensor | Sequence[int]) -> Tensor:
    """Returns y + sum_e (1 - w_e) over a path's edges into a node; weight and choice [E]."""
    # An edge that is not in the path has no siblings either.
    there = torch.as_tensor(choice, device=weight.device) >= 0
    rest = torch.where(there, 1 - weight, 0)
    return cast(Tensor, _AddZero.apply(y, rest.sum()))


def stem_once(stem: nn.Sequential, x: Tensor, paths: int | None) -> Tensor:
    """Runs the stem on x, once for every path; leaves its norm as a call for each leaves it."""
    norm, times = stem[1], paths or 1
    if times == 1:
        return stem(x)
    assert isinstance(norm, nn.BatchNorm2d)
    momentum = norm.momentum
    moves = norm.training and norm.running_mean is not None and momentum is not None
    if moves:
        assert momentum is not None and norm.num_batches_tracked is not None
        # The norm sees one batch `times` times: (1 - m)^times is left of what was, the rest is the
        # batch.
        norm.momentum = 1 - (1 - momentum) ** times
        norm.num_batches_tracked += times - 1
    try:
        return torch.cat([stem(x)] * times)
    finally:
        norm.momentum = momentum
