"""Benchmarks relu_conv_bn: the preprocessing of the cells of the default search network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fastnas.benchmarks.harness.verify import SEED, Problem
from fastnas.benchmarks.ops.mixed_sum import BATCHES, fused_backends
from fastnas.benchmarks.ops.modules import module_problem, twin
from fastnas.layers.primitives import FactorizedReduce, ReLUConvBN
from fastnas.ops import relu_conv_bn

OP = "relu_conv_bn"
PREPROCESSING = (
    ((64, 32, 32), 16, 1),
    ((128, 16, 16), 32, 1),
    ((256, 8, 8), 64, 1),
    ((64, 32, 32), 32, 2),
)
"""[C_in, H, W], C and stride: of one cell of each stage, and behind the first reduction."""


@dataclass(frozen=True)
class ReluConvBnCase:
    """Describes a case; `shape` is the input's, stride 2 is the factorized reduction."""

    shape: tuple[int, ...]
    C: int
    stride: int = 1
    dtype: torch.dtype = torch.float32

    K = None
    layout = "contiguous"

    @property
    def op(self) -> str:
        return f"{OP} to {self.C}" + (f" stride {self.stride}" if self.stride > 1 else "")

    def bytes_moved(self, pass_: str) -> int:
        """Counts forward x once and y three times, written before its statistics are known.

        Backward dy and y are read twice, for the sums come first, x is read and dx written.
        Parameters are not counted.
        """
        x = math.prod(self.shape)
        y = x // self.shape[1] * self.C // self.stride**2
        # x is read once; y is written, read for its statistics and written again.
        forward, backward = x + 3 * y, 2 * x + 4 * y
        values = {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[pass_]
        return values * self.dtype.itemsize

    def fma(self, pass_: str) -> int:
        """Counts those of the 1x1 kernels; backward both gradients."""
        forward = math.prod(self.shape) * self.C // self.stride**2
        return forward * {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[pass_]

    def problem(self, device: str, full: bool) -> Problem:
        torch.manual_seed(SEED)
        C_in = self.shape[1]
        eager: nn.Module = (
            ReLUConvBN(C_in, self.C, 1, 1, 0, affine=False)
            if self.stride == 1
            else FactorizedReduce(C_in, self.C, affine=False)
        )
        eager = eager.to(device, self.dtype)
        own = {
            f"fastnas-{backend}": _fused(twin(eager), backend)
            for backend in fused_backends(device, self.dtype, 1, OP)
        }
        return module_problem(eager, own, [self.shape], None, full)


def _fused(module: nn.Module, backend: str) -> Callable[[Tensor], Tensor]:
    """Calls the op on the parameters and running statistics of a module."""
    modules = list(module.modules())
    # A factorized reduction has two convolutions, and one batch norm after both.
    (norm,) = (m for m in modules if isinstance(m, nn.BatchNorm2d))
    return partial(
        relu_conv_bn,
        params=[m.weight for m in modules if isinstance(m, nn.Conv2d)],
        running=(norm.running_mean, norm.running_var),
        backend=backend,
    )


def cases(device: str, quick: bool = False, full: bool = False) -> list[ReluConvBnCase]:
    """Lists all; with `quick` the last stage and the reduction."""
    if not fused_backends(device, torch.float32, 1, OP):
        return []
    return [
        ReluConvBnCase((BATCHES[device][0], *size), C, stride)
        for size, C, stride in (PREPROCESSING[2:] if quick else PREPROCESSING)
    ]
