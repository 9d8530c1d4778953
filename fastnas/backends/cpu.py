"""C++ on the CPU: fastnas._C, vector width chosen at run time, OpenMP threads as torch has them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnas.backends.native import NativeBackend, load_native


class CpuBackend(NativeBackend):
    name = "cpu"
    device = "cpu"

    def __init__(self) -> None:
        super().__init__(*load_native("_C"))

    def launch_argument(self, like: Tensor) -> int:
        return torch.get_num_threads()
