"""What the backends with kernels of their own share: layouts, and one allocation per output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastnas.backends.held import accumulation_dtype
from fastnas.backends.layout import channels_and_pixels, common_format, in_common_format
from fastnas.backends.request import Request


@dataclass(frozen=True)
class MixedSumNoise:
    """The noise of one call as kernels read it: all tensors on the device of the terms."""

    noisy: list[int]
    form: str
    level: Tensor | None
    rng: Tensor | None
    std: Tensor
    channels: int
    pixels: int


class FusedBackend:
    """A backend whose kernels fill outputs that it is given."""

    name: str
    device: str

    def can_run(self, request: Request) -> str | None:
        return request.refusal(self.name, self.device)

    def block_count(self, n: int) -> int:
        """Partial sums that n elements need."""
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
        where = channels_and_pixels(y, layout)
        noise = MixedSumNoise(noisy, form, level, rng, std, *where)
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
        dy = dy.contiguous(memory_format=layout)
        x = [t.contiguous(memory_format=layout) for t in x] if needs_dw else []
        wide_w = _accumulated(w, dy)
        dw = wide_w.new_empty(w.numel() if needs_dw else 0)
        dx = [torch.empty_like(dy, memory_format=layout) if need else None for need in needs_dx]
        partial = _float64(dy, dw.numel() * self.block_count(dy.numel()))
        where = channels_and_pixels(dy, layout)
        noise = MixedSumNoise(noisy, form, level, rng, std, *where)
        self.launch_mixed_sum_bwd(dy, x, wide_w, dx, dw, noise, partial)
        return [d for d in dx if d is not None], dw.to(w.dtype)


def _accumulated(w: Tensor, like: Tensor) -> Tensor:
    return w.to(accumulation_dtype(like.dtype)).contiguous()


def _float64(like: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float64, device=like.device)
