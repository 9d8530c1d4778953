"""CUDA C++: fastnas._cuda on torch's current stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnas.backends.native import NativeBackend, load_native
from fastnas.backends.relu_conv_bn import MatmulReluConvBn


def allows_tf32() -> bool:
    """Whether fp32 products may round their operands to TF32: torch's switch for matmul."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


class CudaBackend(MatmulReluConvBn, NativeBackend):
    name = "cuda"
    device = "cuda"
    edges_format = torch.contiguous_format
    takes_choice = True

    def __init__(self) -> None:
        super().__init__(*load_native("_cuda"))

    def launch_argument(self, like: Tensor) -> int:
        return torch.cuda.current_stream(like.device).cuda_stream

    def set_launch(self, call: Any, like: Tensor) -> None:
        call.stream = self.launch_argument(like)
        call.tf32 = allows_tf32()

    def call(self, name: str, like: Tensor, *arguments: Any) -> None:
        # The stream is that device's, which need not be the current one.
        with torch.cuda.device(like.device):
            super().call(name, like, *arguments)

    def unavailable(self) -> str | None:
        if self.missing is not None:
            return self.missing
        reason: str = self.module.device_problem()
        return reason or (None if torch.cuda.is_available() else "this torch has no CUDA")
