"""Holds every op to one rule, element by element and by norms.

With e the fp64 reference on the same inputs upcast and g what eager torch gives in the dtype at
hand, an output o passes element by element where

    |o - e| <= 2 |g - e| + R,    R = eps(dtype of o) |e| + A S + smallest subnormal(dtype of o)

R is the rounding term: one rounding of the stored result, and A = 4 eps(float32) for sums that are
accumulated in float32. S is the same sum with every number replaced by its magnitude. For float64
A = 1e-10 and eager's error counts for nothing.

By norms, the results o of a kind (y, dx, dw, dparams, running mean or variance) pass together where

    |o - e| <= 2 |g - e| + (eps(dtype of o) + 16 eps(float32)) |e| + smallest subnormal(dtype of o)

in the L2 norm over all of them: a relu or a max-pool whose argument rounds to the other side makes
single elements of a gradient jump, in eager as well. For float64 each result passes alone where no
element is off by more than 1e-10 of the largest of its kind: the gradient of a pointwise kernel is
orthogonal to its rows, for batch norm takes their length out, so alone it may be only rounding.

Either way an element that is inf or NaN in e and in g has to be inf or NaN in o, and one that is
finite in both has to be finite in o, unless e is beyond the largest number of its dtype. Where only
g is not, a product overflowed in the dtype at hand, and o may overflow as well, or be right to R.
Where only e is not, a factor underflowed, and any o will do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Results = dict[str, Tensor]


class Miss(AssertionError):
    """Results outside of the rule; `ratio` is the largest error, as a multiple of its bound."""

    def __init__(self, message: str, ratio: float) -> None:
        super().__init__(message)
        self.ratio = ratio


class Allowance(NamedTuple):
    """What a fuzzed call may be off by beyond the rule; the tests of an op allow nothing."""

    sensitivity: Results | None = None
    """How much the exact results move where each input moves by `roundings`. It matters where a
    result is nothing but what rounding leaves, as the gradient of a few normalised values; with it
    numbers may underflow, as in a gradient of subnormal numbers."""
    overflow: bool = False
    """Whether results may be inf or NaN, as where a variance is beyond the range of float32: torch
    sums it in float64."""


NOTHING = Allowance()


def raise_first(misses: list[Miss]) -> None:
    """Raises the first of the misses, with the largest of their ratios."""
    if misses:
        raise Miss(str(misses[0]), max(miss.ratio for miss in misses))


def rounding(exact: Tensor, scale: Tensor, dtype: torch.dtype, accumulated: torch.dtype) -> Tensor:
    """R of the rule at the top."""
    stored = torch.finfo(dtype)
    sums = 1e-10 if accumulated == torch.float64 else 4 * torch.finfo(torch.float32).eps
    return stored.eps * exact.abs() + sums * scale + stored.smallest_normal * stored.eps


def elementwise(
    got: Mapping[str, Tensor | None],
    exact: Mapping[str, Tensor | None],
    eager: Mapping[str, Tensor | None],
    scales: Mapping[str, Tensor | None],
    dtype: torch.dtype,
    allowance: Allowance = NOTHING,
) -> None:
    """Fails unless each element obeys the rule; `dtype` is that of the inputs, None not wanted."""
    misses = []
    for name, found in got.items():
        if found is None:
            continue
        want, like, scale = exact[name], eager[name], scales[name]
        assert want is not None and like is not None and scale is not None
        _same_kind_of_tensor(name, found, want, like)
        misses += _element_misses(name, found.cpu(), want, like, scale, dtype, allowance)
    raise_first(misses)


def _same_kind_of_tensor(name: str, found: Tensor, want: Tensor, like: Tensor) -> None:
    if found.shape != want.shape:
        raise Miss(f"{name} has shape {list(found.shape)}", torch.inf)
    if found.dtype != like.dtype:
        raise Miss(f"{name} is {found.dtype}", torch.inf)


def _element_misses(
    name: str,
    found: Tensor,
    want: Tensor,
    like: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    allowance: Allowance,
) -> list[Miss]:
    error = (found.double() - want).abs()
    # Of an empty tensor the scale, a mean, is NaN.
    bound = rounding(want, scale.nan_to_num(nan=0.0), found.dtype, dtype)
    if dtype != torch.float64:
        bound = bound + 2 * torch.where(like.isfinite(), (like.double() - want).abs(), 0)
    too_large = want.abs() + bound > torch.finfo(found.dtype).max
    may_overflow = ~(want.isfinite() & like.isfinite()) | too_large | allowance.overflow
    right = torch.where(want.isfinite(), error <= bound, like.isfinite())
    right = right | (may_overflow & ~found.isfinite())
    if right.all():
        return []
    ratio = torch.nan_to_num((error / bound), nan=torch.inf, posinf=torch.inf)
    i = int(torch.where(right, -1, ratio).argmax())
    return [
        Miss(
            f"{name}: {int((~right).sum())} of {right.numel()} elements are off; the worst, flat"
            f" index {i}, is {found.flatten()[i].item()} instead of {want.flatten()[i].item()},"
            f" an error of {error.flatten()[i].item():.3g} where"
            f" {bound.flatten()[i].item():.3g} is allowed",
            float(ratio.flatten()[i]),
        )
    ]


def kind_of(name: str) -> str:
    """dparams[3] is one of the dparams, running[3].var of the running variances."""
    head, _, tail = name.partition("[")
    return head + tail.partition("]")[2]


def agree(
    got: Results,
    exact: Results,
    eager: Results,
    dtype: torch.dtype,
    allowance: Allowance = NOTHING,
) -> None:
    """Fails unless all results obey the rule by norms; `dtype` is that of the inputs."""
    double = dtype == torch.float64
    got = {name: t.cpu() for name, t in got.items()}
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    misses = []
    for name, found in got.items():
        _same_kind_of_tensor(name, found, exact[name], eager[name])
        misses += _misplaced(name, found, exact[name], eager[name], allowance)
        kinds[kind_of(name)].append(name)

    def norm(tensors: Iterable[Tensor]) -> float:
        """Of their numbers: where an inf or a NaN may be is settled above."""
        values = torch.cat([t.double().flatten() for t in tensors])
        values = values[values.isfinite()]
        return float(values.abs().max() if double else values.norm()) if len(values) else 0.0

    for kind, names in kinds.items():
        scale = norm(t for name, t in exact.items() if kind_of(name) == kind)
        for group in [[name] for name in names] if double else [names]:
            stored = torch.finfo(got[group[0]].dtype)
            if double:
                bound = max(1e-10, 0 if stored.bits == 64 else stored.eps) * scale
            else:
                # Of torch's bf16 weight gradients some elements are memory that it never wrote.
                eagers = norm(eager[name].double() - exact[name] for name in group)
                bound = 2 * eagers + (stored.eps + 16 * torch.finfo(torch.float32).eps) * scale
            bound += stored.smallest_normal * stored.eps
            if allowance.sensitivity is not None:
                bound += norm(allowance.sensitivity[name] for name in group)
                bound += 16 * torch.finfo(torch.promote_types(dtype, torch.float32)).smallest_normal
            off = {name: got[name].double() - exact[name] for name in group}
            if allowance.overflow:  # eager says nothing where it overflows
                off = {name: t[eager[name].isfinite()] for name, t in off.items()}
            error = norm(off.values())
            if not error <= bound:
                message = f"{', '.join(group)}: off by {error:.3g} where {bound:.3g} is allowed"
                misses.append(Miss(message, error / bound if bound else torch.inf))
    raise_first(misses)


def nudged(t: Tensor, by: float, generator: torch.Generator) -> Tensor:
    """t in float64, each element up or down by this part of it."""
    signs = 2.0 * torch.randint(2, t.shape, generator=generator).double() - 1
    return t.double() * (1 + by * signs)


def roundings(dtype: torch.dtype) -> float:
    """256 roundings of the dtype that this one accumulates in, as of a sum of so many."""
    return 256 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def _misplaced(
    name: str, found: Tensor, want: Tensor, like: Tensor, allowance: Allowance
) -> list[Miss]:
    """Elements that are finite where they must not be, or the other way round."""
    if allowance.sensitivity is not None:
        moved = allowance.sensitivity[name]
        if (want.isfinite() & ~moved.isfinite()).any():
            return []  # a relu or a max-pool turns to its other side, and an inf takes another way
    fits = want.abs() <= torch.finfo(found.dtype).max
    lost = fits & like.isfinite() & ~found.isfinite() & (not allowance.overflow)
    hidden = ~want.isfinite() & ~like.isfinite() & found.isfinite()
    return [
        Miss(f"{name}: {int(where.sum())} of {where.numel()} elements are {what}", torch.inf)
        for where, what in ((lost, "not finite"), (hidden, "finite instead of inf or NaN"))
        if where.any()
    ]
