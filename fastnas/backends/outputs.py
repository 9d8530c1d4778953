"""Lays inputs out and allocates outputs, for every backend whose kernels fill what they are given.

A class here is an op's kernel but for the last step: a subclass fills what it is given (`fill`,
`fill_grads`), by C++ in native_sums.py and by Triton in triton.py. So both run on the same layouts,
and what is contiguous, widened to the accumulation dtype or empty is decided in one place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from fastnas.backends.address import laid_out
from fastnas.backends.calls import Noise, NormSumCall, PathsCall, SumCall
from fastnas.backends.layout import common_format, in_common_format, in_format
from fastnas.backends.saved import accumulation_dtype
from fastnas.reference import terms_read

Tuple = TypeVar("Tuple", Noise, PathsCall)


class Place(NamedTuple):
    """Says how all terms of a sum lie in memory: what kernels take strides and statistics by."""

    layout: torch.memory_format
    channels_last: bool
    channels: int
    """0 where terms have no second axis."""
    pixels: int
    """Of one image: the values that a channel has there."""

    @staticmethod
    def of(like: Tensor, layout: torch.memory_format) -> Place:
        shape = like.shape
        channels, pixels = (shape[1], shape[2:].numel()) if len(shape) > 1 else (0, 0)
        return Place(layout, layout != torch.contiguous_format, channels, pixels)


class SumKernel(ABC):
    """Allocates for mixed_sum: y, shaped like the terms, and a deviation for each noisy one."""

    @abstractmethod
    def blocks(self, n: int) -> int:
        """Returns how many partial sums n elements need room for; 0 where kernels bring theirs."""

    @abstractmethod
    def fill(self, call: SumCall, place: Place, y: Tensor, std: Tensor, partial: Tensor) -> None:
        """Fills y, and std where it has room."""

    @abstractmethod
    def fill_grads(
        self,
        dy: Tensor,
        call: SumCall,
        place: Place,
        std: Tensor,
        dx: list[Tensor | None],
        dw: Tensor,
        partial: Tensor,
    ) -> None:
        """Fills each dx that is not None, and dw unless it is empty (then call.x is, too)."""

    def forward(self, call: SumCall) -> tuple[Tensor, list[Tensor]]:
        x, layout = in_common_format(call.x)
        y = torch.empty_like(x[0], memory_format=layout)
        std = _new_deviations(y, call.noise)
        # Relative noise needs count, mean and squares of each block first.
        partial = _float64(y, 3 * self.blocks(y.numel()) * std.numel())
        own = call._replace(x=x, w=_widened(call.w, y), noise=_readable(call.noise))
        self.fill(own, _place(y, layout), y, std, partial)
        return y, [std]

    def backward(
        self, grad: Tensor, call: SumCall, saved: list[Tensor], needs: list[bool]
    ) -> list[Tensor]:
        needs_dw, *needs_dx = needs
        # dy decides, as `format` of the op's description tells torch.compile: where dw is not
        # wanted there are no terms to ask.
        layout = common_format([grad])
        dy, *x = in_format([grad, *(call.x if needs_dw else [])], layout)
        w = _widened(call.w, dy)
        dw = w.new_empty(w.numel() if needs_dw else 0)
        dx = [torch.empty_like(dy, memory_format=layout) if need else None for need in needs_dx]
        # [blocks, K]: each block stores its own sums. With atomics the order of an addition, and so
        # its last bits, would be a matter of luck.
        partial = _float64(dy, dw.numel() * self.blocks(dy.numel()))
        own = call._replace(x=x, w=w, noise=_readable(call.noise))
        self.fill_grads(dy, own, _place(dy, layout), laid_out(saved[0]), dx, dw, partial)
        return [*([dw.to(call.w.dtype)] if needs_dw else []), *(d for d in dx if d is not None)]


_IN_ORDER = Place(torch.contiguous_format, False, 0, 0)


def _place(like: Tensor, layout: torch.memory_format) -> Place:
    """Returns the place of terms without statistics, for which channels last alone has channels."""
    return _IN_ORDER if layout is torch.contiguous_format else Place.of(like, layout)


class NormSumKernel(ABC):
    """Allocates for mixed_norm_sum: as for mixed_sum, and mean and variance of each normed term.

    In the calls that `fill` and `fill_grads` are given, mean and var are always there: in training
    forward fills them.
    """

    @abstractmethod
    def blocks(self, n: int) -> int:
        """Returns what `SumKernel.blocks` does."""

    @abstractmethod
    def parts(self, n: int, place: Place) -> int:
        """Returns how many partial sums a channel needs room for, of n elements in all."""

    @abstractmethod
    def fill(
        self,
        call: NormSumCall,
        training: bool,
        place: Place,
        y: Tensor,
        std: Tensor,
        moments: Tensor,
        partial: Tensor,
    ) -> None:
        """Fills y, in training call.mean and call.var, and std where it has room."""

    @abstractmethod
    def fill_grads(
        self,
        dy: Tensor,
        call: NormSumCall,
        training: bool,
        place: Place,
        std: Tensor,
        dz: list[Tensor | None],
        dw: Tensor,
        partial: Tensor,
    ) -> None:
        """Fills each dz that is not None, and dw unless it is empty. What it does not read of
        call.z is None."""

    def forward(self, call: NormSumCall) -> tuple[Tensor, list[Tensor]]:
        z, layout = in_common_format(call.z)
        y = torch.empty_like(z[0], memory_format=layout)
        training = call.mean is None
        mean, var = _statistics(call, y)
        std = _new_deviations(y, call.noise)
        partial = _float64(y, 3 * self.blocks(y.numel()) * std.numel())
        place = Place.of(y, layout)
        parts = self.parts(y.numel(), place) if training and y.numel() else 0
        # [norms, parts, C, 3] in C++, of which Triton fills two thirds: moments of parts, which are
        # merged in an order that their number fixes.
        moments = _float64(y, 3 * parts * mean.numel())
        own = call._replace(
            z=z, w=_widened(call.w, y), mean=mean, var=var, noise=_readable(call.noise)
        )
        self.fill(own, training, place, y, std, moments, partial)
        return y, [std, *((mean, var) if training else ())]

    def backward(
        self, grad: Tensor, call: NormSumCall, saved: list[Tensor], needs: list[bool]
    ) -> list[Tensor]:
        needs_dw, *needs_dz = needs
        training = call.mean is None
        read = terms_read(call.normed, training, needs_dz, needs_dw)
        # Only terms that backward reads may decide: autograd gives None for the others, where a
        # direct call of the op gives tensors.
        kept = [z_k for z_k, is_read in zip(call.z, read) if is_read]
        layout = common_format(kept or [grad])
        dy = laid_out(grad, layout)
        z = [laid_out(z_k, layout) if is_read else None for z_k, is_read in zip(call.z, read)]
        w = _widened(call.w, dy)
        dw = w.new_empty(w.numel() if needs_dw else 0)
        dz = [torch.empty_like(dy, memory_format=layout) if need else None for need in needs_dz]
        # There is a sum for each term, and that of dy itself.
        place = Place.of(dy, layout)
        parts = self.parts(dy.numel(), place) if kept and dy.numel() else 0
        partial = _float64(dy, (w.numel() + 1) * parts * dy.shape[1])
        std, mean, var = (laid_out(t) for t in (saved if training else (*saved, *given(call))))
        own = call._replace(
            z=cast(list[Tensor], z), w=w, mean=mean, var=var, noise=_readable(call.noise)
        )
        self.fill_grads(dy, own, training, place, std, dz, dw, partial)
        return [*([dw.to(call.w.dtype)] if needs_dw else []), *(d for d in dz if d is not None)]


class PathsKernel(ABC):
    """Allocates for sample_paths: what is sampled, and its weights."""

    @abstractmethod
    def fill(self, call: PathsCall, op: Tensor, weight: Tensor) -> None:
        """Fills op and weight."""

    @abstractmethod
    def fill_grads(
        self, dweight: Tensor, call: PathsCall, op: Tensor, dalpha: Tensor, dbeta: Tensor
    ) -> None:
        """Fills dalpha, and dbeta where there is a beta."""

    def forward(self, call: PathsCall) -> tuple[Tensor, list[Tensor]]:
        alpha = call.alpha
        # op and weight are [paths, ..., E] for alpha [..., E, O].
        shape = (call.paths, *alpha.shape[:-1])
        op = torch.empty(shape, dtype=torch.int64, device=alpha.device)
        weight = torch.empty(shape, dtype=alpha.dtype, device=alpha.device)
        self.fill(_readable(call), op, weight)
        return weight, [op]

    def backward(
        self, grad: Tensor, call: PathsCall, saved: list[Tensor], needs: list[bool]
    ) -> list[Tensor]:
        own = _readable(call)
        # Kernels write every element, zeros for what was not sampled.
        dalpha = torch.empty_like(own.alpha)
        dbeta = dalpha.new_empty(0) if own.beta is None else torch.empty_like(own.beta)
        self.fill_grads(laid_out(grad), own, laid_out(saved[0]), dalpha, dbeta)
        return [d for d, need in zip((dalpha, dbeta), needs) if need]


def _readable(call: Tuple) -> Tuple:
    """Returns the call, or the noise of one, with each of its tensors laid out for kernels."""
    values: list[Any] = [laid_out(v) if isinstance(v, Tensor) else v for v in call]
    return type(call)(*values)


def _widened(w: Tensor, like: Tensor) -> Tensor:
    """Returns mixing weights in the dtype that sums are accumulated in."""
    wide = accumulation_dtype(like.dtype)
    return laid_out(w if w.dtype is wide else w.to(wide))


def _statistics(call: NormSumCall, y: Tensor) -> tuple[Tensor, Tensor]:
    """Returns room for the statistics of the batch, or those that are given."""
    if call.mean is not None:
        mean, var = (laid_out(t) for t in given(call))
        return mean, var
    size, dtype = (sum(call.normed), y.shape[1]), accumulation_dtype(y.dtype)
    fresh = torch.empty if y.numel() else torch.zeros  # no kernel runs on an empty batch
    mean, var = (fresh(size, dtype=dtype, device=y.device) for _ in range(2))
    return mean, var


def given(call: NormSumCall) -> tuple[Tensor, Tensor]:
    """Returns the statistics of a call that is not in training."""
    assert call.mean is not None and call.var is not None
    return call.mean, call.var


def _new_deviations(like: Tensor, noise: Noise) -> Tensor:
    """Returns room for a deviation of each noisy term, where the noise is relative to them."""
    return _float64(like, len(noise.noisy) if noise.form == "gaussian_additive" else 0)


def _float64(like: Tensor, size: int) -> Tensor:
    if size == 0:
        return _empty_float64(like.device)
    return torch.empty(size, dtype=torch.float64, device=like.device)


@cache
def _empty_float64(device: torch.device) -> Tensor:
    """Returns one that is made once for each device, since most calls have no noise."""
    with torch.inference_mode(False):  # else it could never be saved for backward
        return torch.empty(0, dtype=torch.float64, device=device)
