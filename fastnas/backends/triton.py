"""Runs fastnas.kernels by Triton, on a GPU, or interpreted on the CPU where TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch

from fastnas.backends.op_table import LOGITS, ON_GPU, Request, register
from fastnas.backends.outputs import NormSumKernel, PathsKernel, Place, SumKernel
from fastnas.backends.relu_conv_bn import MatmulConv


class TritonBackend:
    name = "triton"

    @property
    def interpreted(self) -> bool:
        # Triton reads the variable as it is imported, so it has to be set before the first kernel
        # is used.
        return os.environ.get("TRITON_INTERPRET") == "1"

    @property
    def device(self) -> str:
        return "cpu" if self.interpreted else "cuda"

    def unavailable(self) -> str | None:
        # It is looked for, not imported: whoever asks what is available should not wait for it.
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if self.interpreted or torch.cuda.is_available():
            return None
        return "there is no CUDA device, and TRITON_INTERPRET is not 1"

    def can_run(self, request: Request) -> str | None:
        return request.refusal(self.name, self.device)


def kernels(op: str) -> Any:
    """Imports fastnas.kernels.<op> at first use: Triton takes 0.5 s to import."""
    return importlib.import_module(f"fastnas.kernels.{op}")


class TritonSum(SumKernel):
    def blocks(self, n: int) -> int:
        count: int = kernels("mixed_sum").block_count(n)
        return count

    def fill(self, *given: Any) -> None:
        kernels("mixed_sum").forward(*given)

    def fill_grads(self, *given: Any) -> None:
        kernels("mixed_sum").backward(*given)


class TritonNormSum(NormSumKernel):
    def blocks(self, n: int) -> int:
        count: int = kernels("mixed_sum").block_count(n)
        return count

    def parts(self, n: int, place: Place) -> int:
        count: int = kernels("mixed_norm_sum").part_count(place, n // place.channels)
        return count

    def fill(self, *given: Any) -> None:
        kernels("mixed_norm_sum").forward(*given)

    def fill_grads(self, *given: Any) -> None:
        kernels("mixed_norm_sum").backward(*given)


class TritonPaths(PathsKernel):
    def fill(self, *given: Any) -> None:
        kernels("sample_paths").forward(*given)

    def fill_grads(self, *given: Any) -> None:
        kernels("sample_paths").backward(*given)


BACKEND = TritonBackend()
_norm_sum = TritonNormSum()
register("mixed_sum", "triton", TritonSum(), ON_GPU)
register("mixed_norm_sum", "triton", _norm_sum, ON_GPU)
register("relu_conv_bn", "triton", MatmulConv(_norm_sum), ON_GPU)
register("sample_paths", "triton", TritonPaths(), LOGITS)
