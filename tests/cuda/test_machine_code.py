"""What nvcc makes of the kernels computes what g++ makes of the same text.

A machine of benchmarks/model runs the machine code of every launch, on the memory of this process.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from host_cuda import HostCudaBackend
from numpy.typing import NDArray
from torch import Tensor

import fastnas
from fastnas import nn, ops
from fastnas.benchmarks.model.counting import count_launch
from fastnas.benchmarks.model.launches import Launch, observed
from fastnas.benchmarks.model.machine import MachineError, Program, run_whole
from fastnas.benchmarks.model.regions import LOADS, STORES, Region
from fastnas.benchmarks.model.sass import Kernel
from fastnas.spaces import get_space

SPACE = get_space("S0")
Run = Callable[[], list[Tensor]]


def mixed_op(stride: int, dtype: torch.dtype, channels: int = 8) -> Run:
    op = nn.MixedOp(SPACE.normal[0], channels, stride).to(dtype)
    x = torch.randn(3, channels, 8, 8, dtype=dtype, requires_grad=True)
    w = torch.softmax(torch.randn(8), 0).requires_grad_()
    dy = torch.randn(3, channels, 8 // stride, 8 // stride, dtype=dtype)
    return lambda: [y := op(x, w), *torch.autograd.grad(y, [x, w, *op.parameters()], dy)]


def mixed_sum(dtype: torch.dtype, shape: tuple[int, ...] = (2, 3, 40, 20)) -> Run:
    x = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(5)]
    w = torch.randn(5, requires_grad=True)
    dy = torch.randn(shape, dtype=dtype)
    return lambda: [y := ops.mixed_sum(x, w), *torch.autograd.grad(y, [*x, w], dy)]


@pytest.mark.parametrize(
    ("case", "bound"),
    [
        (lambda: mixed_op(1, torch.float32), 2e-6),
        (lambda: mixed_op(2, torch.float32), 2e-6),
        # A value that is nearly 0 may round to either side of the relu, one of 3,000 is 2 %.
        (lambda: mixed_op(1, torch.bfloat16, 16), 0.05),
        (lambda: mixed_sum(torch.float32), 1e-6),
        (lambda: mixed_sum(torch.float16), 2e-3),
    ],
    ids=["mixed_op", "stride 2", "bfloat16", "mixed_sum", "mixed_sum fp16"],
)
def test_machine_code_computes_what_the_text_says(
    cuda_host: HostCudaBackend,
    kernels: Mapping[str, Kernel],
    machine: ctypes.CDLL,
    case: Callable[[], Run],
    bound: float,
) -> None:
    ran: list[str] = []

    def see(launch: Launch) -> bool:
        ran.append(launch.kernel)
        run_whole(Program(machine, kernels[launch.kernel]), launch.shape)
        return True

    run = case()
    with fastnas.use_backend("cuda-host"):
        expected = run()
        with observed(Path(str(cuda_host.module.__file__)), see):
            found = run()
    assert ran
    for got, right in zip(found, expected):
        error = torch.linalg.vector_norm((got - right).double())
        assert error <= bound * torch.linalg.vector_norm(right.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_mixed_sum_loads_and_stores_16_bytes_a_lane(
    cuda_host: HostCudaBackend,
    kernels: Mapping[str, Kernel],
    machine: ctypes.CDLL,
    dtype: torch.dtype,
) -> None:
    """Forward reads five terms and writes one tensor, backward reads six and writes five."""
    moved: dict[str, list[float]] = {}

    def see(launch: Launch) -> bool:
        kernel = kernels[launch.kernel]
        region = Region.of(count_launch(Program(machine, kernel), launch.shape).work)
        wide = [region.moved_bytes(names, least=16) for names in (LOADS, STORES)]
        moved[kernel.name.split("<")[0]] = [bytes_ / tensor for bytes_ in wide]
        return True

    shape = (2, 4, 32, 64)
    run, tensor = mixed_sum(dtype, shape), math.prod(shape) * dtype.itemsize
    with fastnas.use_backend("cuda-host"), observed(Path(str(cuda_host.module.__file__)), see):
        run()
    assert moved["mixed_sum_fwd_kernel"] == [5, 1]
    assert moved["mixed_sum_bwd_kernel"] == [6, 5]


def is_mapped(words: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Says which numbers are addresses of this process; its heap may begin at any of them."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in lines]
    spans = [span for span in spans if span[1] < 1 << 63]  # but for the kernel's own page
    return np.any([(words >= first) & (words < last) for first, last in spans], axis=0)


@pytest.mark.parametrize(("moved", "told"), [(2, "misaligned address"), (-(1 << 46), "nothing at")])
def test_a_wrong_address_is_told(
    cuda_host: HostCudaBackend,
    kernels: Mapping[str, Kernel],
    machine: ctypes.CDLL,
    moved: int,
    told: str,
) -> None:
    def see(launch: Launch) -> bool:
        parameters = launch.shape.parameters
        words = np.frombuffer(parameters + bytes(-len(parameters) % 8), np.int64)
        wrong = np.where(is_mapped(words), words + moved, words).tobytes()
        shape = launch.shape._replace(parameters=wrong)
        with pytest.raises(MachineError, match=told):
            run_whole(Program(machine, kernels[launch.kernel]), shape)
        return False

    run = mixed_sum(torch.float32)
    with fastnas.use_backend("cuda-host"), observed(Path(str(cuda_host.module.__file__)), see):
        run()
