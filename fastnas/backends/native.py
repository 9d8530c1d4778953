"""Runs compiled kernels: fastnas._C on the CPU, fastnas._cuda on a GPU.

A kernel takes a params struct (csrc/params.h), which Python makes by the names of its fields
(csrc/bind_ops.h): `Native.params` fills one in, `Native.run` runs a kernel on it. The struct holds
addresses alone, so the tensors behind them have to stay alive until the kernel has ended: the
functions of native_sums.py and native_cells.py keep them in variables of their own.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastnas.backends.op_table import Request

DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}
"""Their names in the params structs."""


def load_native(module: str) -> tuple[ModuleType | None, str | None]:
    """Returns (module, None), or (None, why it does not import)."""
    try:
        # Only an ImportError is an answer. Anything else that goes wrong in a module that was built
        # is a fault, and falling back to eager would hide it.
        return importlib.import_module(f"fastnas.{module}"), None
    except ImportError as error:
        return None, f"fastnas.{module} does not import ({error}); FASTNAS_BUILD governs the build"


class Native:
    """Wraps a module of compiled kernels: says whether it can run, makes structs, runs kernels."""

    def __init__(
        self, name: str, device: str, module: ModuleType | None, missing: str | None = None
    ) -> None:
        self.name = name
        self.device = device
        self.module: Any = module
        self.missing = missing

    def unavailable(self) -> str | None:
        return self.missing

    def can_run(self, request: Request) -> str | None:
        return request.refusal(self.name, self.device)

    def launch(self, like: Tensor) -> dict[str, Any]:
        """Returns the fields that say what runs kernels: threads on a CPU, a stream on a GPU."""
        # It is read at each call, so `torch.set_num_threads` holds for these kernels too. No result
        # depends on it, since sizes alone decide how sums are cut.
        return {"threads": torch.get_num_threads()}

    def params(self, struct: str, **fields: Any) -> Any:
        return getattr(self.module, struct)(**fields)

    def run(self, kernel: str, params: Any, like: Tensor) -> None:
        # The binding releases the GIL while the kernel runs, so another thread may free any tensor
        # that only the addresses in `params` still refer to. On a GPU the call returns before the
        # kernel has ended; there torch's allocator keeps freed memory to the stream, and gives it
        # to later kernels of the same stream only.
        getattr(self.module, kernel)(params)

    def blocks(self, n: int) -> int:
        """Returns for how many partial sums n elements need room: CPU kernels bring their own."""
        return 0

    def uses_tf32(self) -> bool:
        """Tells whether fp32 products may round their operands to TF32."""
        return False


def allows_tf32() -> bool:
    """Reads torch's switch for matmul, which our products follow."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


class NativeCuda(Native):
    """Wraps fastnas._cuda, whose kernels run on torch's current stream."""

    def launch(self, like: Tensor) -> dict[str, Any]:
        # Inside of a capture this is the capturing stream, and so the launches become part of the
        # graph.
        return {"stream": torch.cuda.current_stream(like.device).cuda_stream}

    def run(self, kernel: str, params: Any, like: Tensor) -> None:
        # The stream is one of that device, which need not be the current one.
        with torch.cuda.device(like.device):
            super().run(kernel, params, like)

    def unavailable(self) -> str | None:
        if self.missing is not None:
            return self.missing
        reason: str = self.module.device_problem()
        return reason or (None if torch.cuda.is_available() else "this torch has no CUDA")

    def blocks(self, n: int) -> int:
        count: int = self.module.block_count(n)
        return count

    def uses_tf32(self) -> bool:
        return allows_tf32()


CPU = Native("cpu", "cpu", *load_native("_C"))
CUDA = NativeCuda("cuda", "cuda", *load_native("_cuda"))
