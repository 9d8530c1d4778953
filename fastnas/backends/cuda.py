"""CUDA C++: fastnas._cuda on torch's current stream."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnas.backends.native import NativeBackend, load_native


class CudaBackend(NativeBackend):
    name = "cuda"
    device = "cuda"

    def __init__(self) -> None:
        super().__init__(*load_native("_cuda"))

    def launch_argument(self, like: Tensor) -> int:
        return torch.cuda.current_stream(like.device).cuda_stream

    def unavailable(self) -> str | None:
        if self.missing is not None:
            return self.missing
        reason: str = self.module.device_problem()
        return reason or (None if torch.cuda.is_available() else "this torch has no CUDA")
