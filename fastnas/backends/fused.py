"""What the backends with kernels of their own share: layouts, and one allocation per output."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastnas.backends.address import laid_out
from fastnas.backends.held import accumulation_dtype
from fastnas.backends.layout import channels_and_pixels, common_format, in_common_format, in_format
from fastnas.backends.request import Request
from fastnas.reference import terms_read


class MixedSumNoise(NamedTuple):
    """The noise of one call as kernels read it, and how the terms that it meets lie in memory."""

    noisy: list[int]
    form: str
    level: Tensor | None
    rng: Tensor | None
    std: Tensor
    layout: torch.memory_format
    channels: int
    pixels: int

    @staticmethod
    def of(
        like: Tensor,
        layout: torch.memory_format,
        noisy: list[int],
        form: str,
        level: Tensor | None,
        rng: Tensor | None,
        std: Tensor,
    ) -> MixedSumNoise:
        """On terms shaped like `like`, laid out in `layout`."""
        if level is not None and rng is not None:
            level, rng, std = laid_out(level), laid_out(rng), laid_out(std)
        where = channels_and_pixels(like, layout)
        return MixedSumNoise(noisy, form, level, rng, std, layout, *where)


@dataclass(frozen=True)
class Norm:
    """The batch norm of one call as kernels read it; mean and var are filled in training."""

    normed: list[bool]
    channels: int
    pixels: int
    channels_last: bool
    training: bool
    eps: float
    mean: Tensor
    var: Tensor


class FusedBackend:
    """A backend whose kernels fill outputs that it is given."""

    name: str
    device: str

    def can_run(self, request: Request) -> str | None:
        return request.refusal(self.name, self.device)

    def block_count(self, n: int) -> int:
        """Partial sums that n elements need room for; none where the kernels bring their own."""
        raise NotImplementedError

    def launch_mixed_sum_fwd(
        self, x: list[Tensor], w: Tensor, y: Tensor, noise: MixedSumNoise, partial: Tensor
    ) -> None:
        """Fills y, and noise.std where it has room."""
        raise NotImplementedError

    def launch_mixed_sum_bwd(
        self,
        dy: Tensor,
        x: list[Tensor],
        w: Tensor,
        dx: list[Tensor | None],
        dw: Tensor,
        noise: MixedSumNoise,
        partial: Tensor,
    ) -> None:
        """Fills each dx that is not None, and dw unless it is empty (x is empty then)."""
        raise NotImplementedError

    def mixed_sum_fwd(
        self,
        x: list[Tensor],
        w: Tensor,
        noisy: list[int],
        form: str,
        level: Tensor | None,
        rng: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        x, layout = in_common_format(x)
        y = torch.empty_like(x[0], memory_format=layout)
        std = _float64(y, len(noisy) if form == "gaussian_additive" else 0)
        partial = _float64(y, 3 * self.block_count(y.numel()) * std.numel())
        noise = MixedSumNoise.of(y, layout, noisy, form, level, rng, std)
        self.launch_mixed_sum_fwd(x, _accumulated(w, y), y, noise, partial)
        return y, std

    def mixed_sum_bwd(
        self,
        dy: Tensor,
        x: list[Tensor],
        w: Tensor,
        noisy: list[int],
        form: str,
        level: Tensor | None,
        rng: Tensor | None,
        std: Tensor,
        needs_dx: list[bool],
        needs_dw: bool,
    ) -> tuple[list[Tensor], Tensor]:
        layout = common_format([dy])
        dy, *x = in_format([dy, *(x if needs_dw else [])], layout)
        wide_w = _accumulated(w, dy)
        dw = torch.empty_like(wide_w) if needs_dw else wide_w.new_empty(0)
        dx = [torch.empty_like(dy, memory_format=layout) if need else None for need in needs_dx]
        partial = _float64(dy, dw.numel() * self.block_count(dy.numel()))
        noise = MixedSumNoise.of(dy, layout, noisy, form, level, rng, std)
        self.launch_mixed_sum_bwd(dy, x, wide_w, dx, dw, noise, partial)
        return [d for d in dx if d is not None], dw if dw.dtype == w.dtype else dw.to(w.dtype)

    def norm_parts(self, like: Tensor, norm: Norm) -> int:
        """Partial sums that a channel needs."""
        raise NotImplementedError

    def launch_mixed_norm_sum_fwd(
        self,
        z: list[Tensor],
        w: Tensor,
        y: Tensor,
        norm: Norm,
        noise: MixedSumNoise,
        moments: Tensor,
        partial: Tensor,
    ) -> None:
        """Fills y, norm.mean and norm.var in training, and noise.std where it has room."""
        raise NotImplementedError

    def launch_mixed_norm_sum_bwd(
        self,
        dy: Tensor,
        z: list[Tensor | None],
        w: Tensor,
        dz: list[Tensor | None],
        dw: Tensor,
        norm: Norm,
        noise: MixedSumNoise,
        partial: Tensor,
    ) -> None:
        """Fills each dz that is not None, and dw unless it is empty; z is None where not read."""
        raise NotImplementedError

    def mixed_norm_sum_fwd(
        self,
        z: list[Tensor],
        w: Tensor,
        normed: list[bool],
        mean: Tensor | None,
        var: Tensor | None,
        eps: float,
        noisy: list[int],
        form: str,
        level: Tensor | None,
        rng: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z, layout = in_common_format(z)
        y = torch.empty_like(z[0], memory_format=layout)
        training = mean is None or var is None
        if mean is None or var is None:
            size, dtype = (sum(normed), y.shape[1]), accumulation_dtype(y.dtype)
            fresh = torch.empty if y.numel() else torch.zeros
            mean, var = (fresh(size, dtype=dtype, device=y.device) for _ in range(2))
        else:
            mean, var = (t.clone(memory_format=torch.contiguous_format) for t in (mean, var))
        std = _float64(y, len(noisy) if form == "gaussian_additive" else 0)
        partial = _float64(y, 3 * self.block_count(y.numel()) * std.numel())
        noise = MixedSumNoise.of(y, layout, noisy, form, level, rng, std)
        norm = _norm(y, layout, normed, training, eps, mean, var)
        parts = self.norm_parts(y, norm) if training and y.numel() else 0
        moments = _float64(y, 3 * parts * mean.numel())
        self.launch_mixed_norm_sum_fwd(z, _accumulated(w, y), y, norm, noise, moments, partial)
        return y, mean, var, std

    def mixed_norm_sum_bwd(
        self,
        dy: Tensor,
        z: list[Tensor],
        w: Tensor,
        normed: list[bool],
        mean: Tensor,
        var: Tensor,
        eps: float,
        training: bool,
        noisy: list[int],
        form: str,
        level: Tensor | None,
        rng: Tensor | None,
        std: Tensor,
        needs_dz: list[bool],
        needs_dw: bool,
    ) -> tuple[list[Tensor], Tensor]:
        layout = common_format(z or [dy])
        dy = laid_out(dy, layout)
        given = iter(z)
        terms = [
            laid_out(next(given), layout) if is_read else None
            for is_read in terms_read(normed, training, needs_dz, needs_dw)
        ]
        wide_w = _accumulated(w, dy)
        dw = wide_w.new_empty(w.numel() if needs_dw else 0)
        dz = [torch.empty_like(dy, memory_format=layout) if need else None for need in needs_dz]
        noise = MixedSumNoise.of(dy, layout, noisy, form, level, rng, std)
        norm = _norm(dy, layout, normed, training, eps, laid_out(mean), laid_out(var))
        parts = self.norm_parts(dy, norm) if z and dy.numel() else 0
        partial = _float64(dy, (w.numel() + 1) * parts * dy.shape[1])
        self.launch_mixed_norm_sum_bwd(dy, terms, wide_w, dz, dw, norm, noise, partial)
        return [d for d in dz if d is not None], dw.to(w.dtype)


def _norm(
    like: Tensor,
    layout: torch.memory_format,
    normed: list[bool],
    training: bool,
    eps: float,
    mean: Tensor,
    var: Tensor,
) -> Norm:
    channels, pixels = like.shape[1], like.shape[2:].numel()
    last = layout != torch.contiguous_format
    return Norm(normed, channels, pixels, last, training, eps, mean, var)


def _accumulated(w: Tensor, like: Tensor) -> Tensor:
    return laid_out(w.to(accumulation_dtype(like.dtype)))


def _float64(like: Tensor, size: int) -> Tensor:
    if size == 0:
        return _empty_float64(like.device)
    return torch.empty(size, dtype=torch.float64, device=like.device)


@cache
def _empty_float64(device: torch.device) -> Tensor:
    """Made once: most calls have no noise."""
    with torch.inference_mode(False):  # else it could never be saved for backward
        return torch.empty(0, dtype=torch.float64, device=device)
