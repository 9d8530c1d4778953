"""Triton: fastnas.kernels, on a GPU, or interpreted on the CPU where TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
from torch import Tensor

from fastnas.backends.layout import channels_and_pixels, common_format, in_common_format
from fastnas.backends.native import accumulation_dtype
from fastnas.backends.request import Request


class TritonBackend:
    name = "triton"

    def __init__(self) -> None:
        self._kernels: Any = None

    @property
    def kernels(self) -> Any:
        """fastnas.kernels.mixed_sum, imported at first use: Triton takes 0.5 s to import."""
        if self._kernels is None:
            self._kernels = importlib.import_module("fastnas.kernels.mixed_sum")
        return self._kernels

    @property
    def interpreted(self) -> bool:
        return os.environ.get("TRITON_INTERPRET") == "1"

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if self.interpreted or torch.cuda.is_available():
            return None
        return "there is no CUDA device, and TRITON_INTERPRET is not 1"

    def can_run(self, request: Request) -> str | None:
        return request.refusal(self.name, "cpu" if self.interpreted else "cuda")

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
        std = self._float64(y, len(noisy) if form == "gaussian_additive" else 0)
        partial = self._float64(y, 3 * self.kernels.block_count(y.numel()) * std.numel())
        wide_w = w.to(accumulation_dtype(y.dtype)).contiguous()
        where = channels_and_pixels(y, layout)
        self.kernels.forward(x, wide_w, y, noisy, form, level, rng, std, partial, *where)
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
        x = [t.contiguous(memory_format=layout) for t in x]
        wide_w = w.to(accumulation_dtype(dy.dtype)).contiguous()
        dw = torch.empty_like(wide_w) if needs_dw else wide_w.new_empty(0)
        dx = [torch.empty_like(dy, memory_format=layout) if need else None for need in needs_dx]
        partial = self._float64(
            dy, w.numel() * self.kernels.block_count(dy.numel()) if needs_dw else 0
        )
        where = channels_and_pixels(dy, layout)
        self.kernels.backward(dy, x, wide_w, dx, dw, noisy, form, level, rng, std, partial, *where)
        return [d for d in dx if d is not None], dw.to(w.dtype)

    def _float64(self, like: Tensor, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float64, device=like.device)
