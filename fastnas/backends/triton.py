"""Triton: fastnas.kernels, on a GPU, or interpreted on the CPU where TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from fastnas.backends.fused import MixedSumNoise, Norm
from fastnas.backends.relu_conv_bn import MatmulReluConvBn
from fastnas.backends.sampling import FusedSampling, PathDraw


class TritonBackend(FusedSampling, MatmulReluConvBn):
    name = "triton"

    @staticmethod
    def kernels(op: str) -> Any:
        """fastnas.kernels.<op>, imported at first use: Triton takes 0.5 s to import."""
        return importlib.import_module(f"fastnas.kernels.{op}")

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
        return self.kernels("mixed_sum").block_count(n)

    def launch_mixed_sum_fwd(
        self, x: list[Tensor], w: Tensor, y: Tensor, noise: MixedSumNoise, partial: Tensor
    ) -> None:
        self.kernels("mixed_sum").forward(x, w, y, noise, partial)

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
        self.kernels("mixed_sum").backward(dy, x, w, dx, dw, noise, partial)

    def norm_parts(self, like: Tensor, norm: Norm) -> int:
        values = like.numel() // norm.channels
        return self.kernels("mixed_norm_sum").part_count(norm, values)

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
        self.kernels("mixed_norm_sum").forward(z, w, y, norm, noise, moments, partial)

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
        self.kernels("mixed_norm_sum").backward(dy, z, w, dz, dw, norm, noise, partial)

    def launch_sample_paths_fwd(self, draw: PathDraw, op: Tensor, weight: Tensor) -> None:
        self.kernels("sample_paths").forward(*draw, op, weight)

    def launch_sample_paths_bwd(
        self, draw: PathDraw, op: Tensor, dweight: Tensor, dalpha: Tensor, dbeta: Tensor
    ) -> None:
        self.kernels("sample_paths").backward(*draw, op, dweight, dalpha, dbeta)
