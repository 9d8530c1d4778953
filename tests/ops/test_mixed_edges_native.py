"""What the compiled kernels of mixed_edges promise beyond the rule: order of execution, vector
widths, tiles, and that CUDA gives what the CPU gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from cases import noise_of
from edge_cases import (
    FEW,
    MEMORY,
    TERMS,
    Inputs,
    agree,
    by_eager,
    cell,
    check,
    compare,
    make,
    one_edge,
    run,
    same_bits,
)
from host_cuda import HostCudaBackend
from targets import Target

OP = "mixed_edges"
pytestmark = pytest.mark.backends("cpu", "cuda-host", "cuda")

STRIDES = pytest.mark.parametrize("stride", [1, 2])


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("C", [4, 18])
def test_threads_do_not_change_a_bit(
    backend: Target, dtype: torch.dtype, C: int, memory: str
) -> None:
    inputs = make(cell(2, 2), (9, 7), C, N=21, dtype=dtype,
                  noise=noise_of("gaussian_additive"))  # fmt: skip
    outcomes = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        outcomes.append(run(inputs, "cpu", memory=memory))
    for other in outcomes[1:]:
        same_bits(other, outcomes[0])


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def use_isa(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    native = pytest.importorskip("fastnas._C")
    if request.param not in native.supported_isas():
        pytest.skip(f"this CPU has no {request.param}")
    before = native.isa()
    yield lambda: native.use_isa(request.param)
    native.use_isa(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_vector_width(use_isa: Callable[[], None], dtype: torch.dtype) -> None:
    for C, stride in ((1, 1), (2, 2), (3, 1), (4, 2), (8, 1), (10, 2), (18, 1), (18, 2)):
        names = [name for name in TERMS if C % 2 == 0 or stride == 1 or name != "skip"]
        noise = noise_of("gaussian_additive")
        inputs = make(cell(stride, 1, names), (7, 6), C, N=7, dtype=dtype, noise=noise)
        double = dtype == torch.float64
        before = run(inputs, "cpu") if double else {}
        use_isa()
        got = check(inputs, "cpu")
        if double:
            for name, t in got.items():
                torch.testing.assert_close(t, before[name], rtol=1e-10, atol=1e-10)


@pytest.mark.backends("cpu")
@STRIDES
@pytest.mark.parametrize("C", [1, 2, 3, 4, 5, 8])
def test_images_in_one_vector_do_not_meet(
    use_isa: Callable[[], None], backend: Target, dtype: torch.dtype, C: int, stride: int
) -> None:
    """With statistics that are given, inf and NaN stay in the image that has them."""
    use_isa()
    names = [name for name in TERMS if stride == 1 or C % 2 == 0 or name != "skip"]
    inputs = make(one_edge(stride, *names), (5, 7), C, N=7, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    inputs = replace(inputs, statistics=torch.ones(inputs.table.norms, 2, C, dtype=wide))
    bad = inputs.x[0].clone(memory_format=torch.preserve_format)
    bad[2, 0, 1, 1], bad[2, C - 1, 3, 3] = torch.inf, torch.nan
    others = [0, 1, 3, 4, 5, 6]
    got, want = (run(given, backend.name)["y"] for given in (replace(inputs, x=[bad]), inputs))
    assert got[2].isnan().any()
    same_bits({"y": got[others]}, {"y": want[others]})


# For the CUDA kernels: small tiles of many channels, two passes over a Gram matrix (C > 88), images
# of several tiles, the last one cut, more images than groups, C not a multiple of 4, two tiles that
# take all of 48 KiB.
SHAPES = [(64, 2, (3, 5)), (93, 2, (4, 3)), (2, 2, (40, 36)), (2, 2, (300, 2)), (6, 35, (2, 3)),
          (9, 1, (7, 9)), (1, 3, (1, 5)), (192, 1, (5, 5))]  # fmt: skip


@pytest.mark.backends("cuda-host", "cuda")
@STRIDES
@pytest.mark.parametrize(("C", "N", "size"), SHAPES, ids=str)
def test_tiles_and_groups(
    backend: Target, C: int, N: int, size: tuple[int, int], stride: int
) -> None:
    names = [name for name in FEW if stride == 1 or C % 2 == 0 or name != "skip"]
    size = size[0] * stride - stride // 2, size[1] * stride
    check(make(one_edge(stride, *names), size, C, N, target=backend), backend.name)


def in_every_order(cuda_host: HostCudaBackend, inputs: Inputs, memory: str = "lean") -> None:
    """A missing barrier shows in some order of the threads."""
    try:
        outcomes = []
        for seed in range(5):
            cuda_host.seed(seed)
            outcomes.append(run(inputs, cuda_host.name, memory=memory))
    finally:
        cuda_host.seed(0)
    compare(outcomes[0], inputs)  # NaN in every order is the same bits too
    for other in outcomes[1:]:
        same_bits(other, outcomes[0])


@STRIDES
@pytest.mark.parametrize("memory", MEMORY)
def test_any_order_of_threads_gives_the_same_bits(
    cuda_host: HostCudaBackend, memory: str, stride: int
) -> None:
    noise = noise_of("gaussian_additive")
    inputs = make(cell(stride, 1, FEW), (5, 6), C=6, N=2, dtype=torch.float32, noise=noise)
    in_every_order(cuda_host, inputs, memory)


@pytest.mark.parametrize(("C", "size"), [(2, (23, 34)), (33, (3, 3)), (93, (2, 2))], ids=str)
def test_any_order_on_several_tiles_and_passes(
    cuda_host: HostCudaBackend, C: int, size: tuple[int, int]
) -> None:
    names = [name for name in FEW if C % 2 == 0 or name != "skip"]
    in_every_order(cuda_host, make(one_edge(1, *names), size, C, N=2, dtype=torch.float32))
    if C % 2 == 0:
        in_every_order(cuda_host, make(one_edge(2, *FEW), size, C, N=2, dtype=torch.float32))


@pytest.mark.backends("cuda-host", "cuda")
@pytest.mark.parametrize("form", [None, "gaussian_additive", "uniform_multiplicative"])
def test_cuda_gives_what_the_cpu_gives(
    backend: Target, dtype: torch.dtype, form: str | None
) -> None:
    """The rule with the CPU's results in the place of the exact ones; the same draws."""
    noise = None if form is None else noise_of(form)
    inputs = make(cell(2, 2, FEW), (6, 5), C=6, N=4, dtype=dtype, noise=noise, target=backend)
    there = inputs.cpu()
    if dtype == torch.float16:  # which the CPU's cells do not have
        wide = there.rebuilt([t.float() for t in there.leaves.values()])
        there = replace(wide, dy=there.dy.float())
    on_cpu = run(there, "cpu")
    agree(run(inputs, backend.name), on_cpu, by_eager(inputs), dtype)
