"""C++ on the CPU: fastnas._C, vector width chosen at run time, OpenMP threads as torch has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnas.backends.address import address, addresses, laid_out
from fastnas.backends.held import accumulation_dtype
from fastnas.backends.native import DTYPE_TAGS, NativeBackend, load_native

LAST = torch.channels_last


class CpuBackend(NativeBackend):
    name = "cpu"
    device = "cpu"
    edges_format = LAST

    def __init__(self) -> None:
        super().__init__(*load_native("_C"))

    def block_count(self, n: int) -> int:
        return 0

    def launch_argument(self, like: Tensor) -> int:
        return torch.get_num_threads()

    def set_launch(self, call: Any, like: Tensor) -> None:
        call.threads = torch.get_num_threads()

    def relu_conv_bn_fwd(
        self, x: Tensor, params: list[Tensor], running: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        x = laid_out(x, LAST)
        stride, C = len(params), sum(p.shape[0] for p in params)
        y = _new_channels_last(x, x.shape[0], C, *(-(-size // stride) for size in x.shape[2:]))
        stats = torch.empty(2, C, dtype=accumulation_dtype(x.dtype), device=x.device)
        if running is not None:
            stats.copy_(running)
        if y.numel():
            self._run_relu_conv_bn("fwd", x, params, [], y, None, None, stats, running is None, eps)
        return y, stats

    def relu_conv_bn_bwd(
        self,
        dy: Tensor,
        x: Tensor,
        y: Tensor,
        params: list[Tensor],
        stats: Tensor,
        eps: float,
        needs_dx: bool,
        needs_dparams: bool,
    ) -> tuple[list[Tensor], list[Tensor]]:
        x, y, dy = (laid_out(t, LAST) for t in (x, y, dy))
        dx = [_new_channels_last(x, *x.shape)] if needs_dx else []
        dparams = [
            torch.empty_like(p, memory_format=torch.contiguous_format)
            for p in (params if needs_dparams else [])
        ]
        into = dx[0] if dx else None
        stats = laid_out(stats)
        self._run_relu_conv_bn("bwd", x, params, dparams, y, dy, into, stats, True, eps)
        return dx, dparams

    def _run_relu_conv_bn(
        self,
        direction: str,
        x: Tensor,
        params: list[Tensor],
        dparams: list[Tensor],
        y: Tensor,
        dy: Tensor | None,
        dx: Tensor | None,
        stats: Tensor,
        training: bool,
        eps: float,
    ) -> None:
        params = [laid_out(p) for p in params]
        N, in_C, rows, cols = x.shape
        on = x.device
        at_x, at_y, at_dy, at_dx = addresses((x, y, dy, dx), on, LAST)
        fixed = (
            DTYPE_TAGS[x.dtype], N, rows, cols, in_C, y.shape[1], at_x, addresses(params, on),
            addresses(dparams, on), at_y, at_dy, at_dx, address(stats, on), training, eps,
        )  # fmt: skip
        threads = torch.get_num_threads()
        size = self.module.relu_conv_bn_workspace(*fixed, 0, threads)
        space = torch.empty(size, dtype=torch.uint8, device=on)
        run = getattr(self.module, f"relu_conv_bn_{direction}")
        run(*fixed, address(space, on), threads)


def _new_channels_last(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=LAST)
