"""Triton: fastnas.kernels, on a GPU, or interpreted on the CPU where TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from fastnas.backends.fused import MixedSumNoise
from fastnas.backends.relu_conv_bn import MatmulReluConvBn


class TritonBackend(MatmulReluConvBn):
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

    @property
    def device(self) -> str:  # type: ignore[override]
        return "cpu" if self.interpreted else "cuda"

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if self.interpreted or torch.cuda.is_available():
            return None
        return "there is no CUDA device, and TRITON_INTERPRET is not 1"

    def block_count(self, n: int) -> int:
        return self.kernels.block_count(n)

    def launch_mixed_sum_fwd(
        self, x: list[Tensor], w: Tensor, y: Tensor, noise: MixedSumNoise, partial: Tensor
    ) -> None:
        self.kernels.forward(x, w, y, noise, partial)

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
        self.kernels.backward(dy, x, w, dx, dw, noise, partial)
