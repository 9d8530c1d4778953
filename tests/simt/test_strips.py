"""Strips of convolutions and pools (csrc/cuda/mixed_edges_strips.h) against fp64, on odd planes."""

from __future__ import annotations

import ctypes
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from host_cuda import CSRC, build_host
from torch import Tensor

SOURCE = Path(__file__).parent / "strips.cu"
GXX = shutil.which("g++")
TYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNELS = [(3, 1, 1), (3, 1, 2), (3, 2, 1), (3, 2, 2), (5, 1, 1), (5, 1, 2)]
KERNELS += [(5, 2, 1), (5, 2, 2), (7, 1, 1), (7, 1, 2)]
IMAGES = 2


class Grid(ctypes.Structure):
    _fields_ = [("rows", ctypes.c_int), ("cols", ctypes.c_int)]


class Staged(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("image", ctypes.c_int64), ("grid", Grid)]
    _fields_ += [("type", ctypes.c_int32), ("aligned", ctypes.c_bool)]


class Tiling(ctypes.Structure):
    _fields_ = [("grid", Grid), ("tile", Grid), ("down", ctypes.c_int), ("across", ctypes.c_int)]
    _fields_ += [("pitch", ctypes.c_int)]


class Job(ctypes.Structure):
    _fields_ = [("from_", Staged), ("beside", Staged), ("taps", ctypes.c_void_p)]
    _fields_ += [("tap_type", ctypes.c_int32), ("to", ctypes.c_void_p), ("other", ctypes.c_void_p)]
    _fields_ += [("channels", ctypes.c_int), ("size", ctypes.c_int), ("dilation", ctypes.c_int)]
    _fields_ += [("stride", ctypes.c_int), ("transposed", ctypes.c_int)]
    _fields_ += [("tiling", Tiling)]


@dataclass(frozen=True)
class Plane:
    """The grid of x, and how many rows of what is written a tile has."""

    channels: int
    rows: int
    cols: int
    tile_rows: int

    def out(self, stride: int) -> tuple[int, int]:
        return -(-self.rows // stride), -(-self.cols // stride)


# One pixel; odd ones; the stages of a network; tiles of rows, of columns, of both, with a rest.
PLANES = [Plane(3, 1, 1, 8), Plane(5, 5, 7, 8), Plane(37, 8, 8, 8), Plane(19, 16, 16, 16)]
PLANES += [Plane(6, 32, 32, 16), Plane(2, 33, 40, 16), Plane(3, 20, 12, 8), Plane(2, 28, 28, 16)]
PLANES += [Plane(3, 10, 68, 8), Plane(1, 41, 66, 8), Plane(9, 24, 16, 24), Plane(2, 36, 32, 8)]


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if GXX is None:
        pytest.skip("no g++")
    return built_strips(tmp_path_factory.mktemp("strips") / "strips.so")


def built_strips(target: Path, *more: str, checks: str = "") -> ctypes.CDLL:
    flags = ["-Wall", "-Wextra", "-Werror", "-fvisibility=default", f"-I{CSRC / 'cuda'}", *more]
    build_host([SOURCE], target, *flags, checks=checks)
    return ctypes.CDLL(str(target))


def in_slice(values: Tensor) -> Tensor:
    """The values as a part of a larger tensor, NaN around them; images lie 16-byte aligned."""
    images, channels, rows, cols = values.shape
    image = -(-(channels + 1) * rows * cols // 8) * 8
    whole = torch.full((images * image + 8,), torch.nan, dtype=values.dtype)
    view = whole.as_strided(values.shape, (image, rows * cols, cols, 1))
    view.copy_(values)
    return view


def staged(values: Tensor | None, aligned: bool) -> Staged:
    if values is None:
        return Staged()
    grid = Grid(*values.shape[2:])
    aligned = aligned and values.shape[3] % 4 == 0 and values.stride(0) % 4 == 0
    return Staged(values.data_ptr(), values.stride(0), grid, TYPES.index(values.dtype), aligned)


def tiling(rows: int, cols: int, tile_rows: int) -> Tiling:
    tile_cols = 32 if cols > 32 else -(-cols // 4) * 4
    tile_rows = min(tile_rows, rows)
    down, across = -(-rows // tile_rows), -(-cols // tile_cols)
    return Tiling(Grid(rows, cols), Grid(tile_rows, tile_cols), down, across, 0)


def made_job(
    plane: Plane, kernel: tuple[int, int, int], data: Tensor, aligned: bool, to: Tensor | None,
    *, beside: Tensor | None = None, taps: Tensor | None = None, other: Tensor | None = None,
    transposed: bool = False,
) -> Job:  # fmt: skip
    size, dilation, stride = kernel
    written = (plane.rows, plane.cols) if transposed else plane.out(stride)
    cut = tiling(*written, plane.tile_rows)
    return Job(
        staged(data, aligned), staged(beside, aligned), None if taps is None else taps.data_ptr(),
        0 if taps is None else TYPES.index(taps.dtype), None if to is None else to.data_ptr(),
        None if other is None else other.data_ptr(), plane.channels, size, dilation, stride,
        transposed, cut,
    )  # fmt: skip


def case(index: int) -> tuple[torch.dtype, bool]:
    return TYPES[index % 3], index % 5 != 0


def drawn(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def convolved(x: Tensor, taps: Tensor, dilation: int, stride: int) -> Tensor:
    pad = dilation * (taps.shape[-1] // 2)
    return F.conv2d(x.relu(), taps, None, stride, pad, dilation, groups=x.shape[1])


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("plane", PLANES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_convolution_and_gradients(
    lib: ctypes.CDLL, kernel: tuple[int, int, int], plane: Plane
) -> None:
    size, dilation, stride = kernel
    dtype, aligned = case(PLANES.index(plane) + KERNELS.index(kernel))
    out, channels = plane.out(stride), plane.channels
    x = in_slice(drawn(1, IMAGES, channels, plane.rows, plane.cols, dtype=dtype))
    taps = drawn(2, channels, 1, size, size, dtype=dtype)
    du = in_slice(drawn(3, IMAGES, channels, *out, dtype=dtype))
    x64, taps64 = x.double().requires_grad_(), taps.double().requires_grad_()
    u64 = convolved(x64, taps64, dilation, stride)

    u = torch.full((IMAGES, channels, *out), torch.nan)
    job = made_job(plane, kernel, x, aligned, u, taps=taps)
    assert lib.run_convolve(ctypes.byref(job), IMAGES) == 0
    close(u, u64.detach())

    dx = torch.full((IMAGES, channels, plane.rows, plane.cols), torch.nan)
    job = made_job(plane, kernel, du, aligned, dx, taps=taps, transposed=True)
    assert lib.run_transpose(ctypes.byref(job), IMAGES) == 0
    (dx64,) = torch.autograd.grad(u64, x64, du.double(), retain_graph=True)
    close(dx * (x > 0), dx64)

    lanes = torch.zeros(IMAGES, channels, size * size, 32)
    job = made_job(plane, kernel, x, aligned, None, beside=du, other=lanes)
    assert lib.run_correlate(ctypes.byref(job), IMAGES) == 0
    (dtaps64,) = torch.autograd.grad(u64, taps64, du.double())
    close(lanes.double().sum((0, 3)).reshape(taps.shape), dtaps64)


@pytest.mark.parametrize("plane", PLANES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_average_pool(lib: ctypes.CDLL, stride: int, plane: Plane) -> None:
    dtype, aligned = case(PLANES.index(plane) + stride)
    out, kernel = plane.out(stride), (3, 1, stride)
    # Far from zero, where nine values added up would round at the size of their sum.
    x = in_slice(drawn(4, IMAGES, plane.channels, plane.rows, plane.cols, dtype=dtype) + 4096)
    x64 = x.double().requires_grad_()
    z64 = F.avg_pool2d(x64, 3, stride, 1, count_include_pad=False)
    z = torch.full((IMAGES, plane.channels, *out), torch.nan)
    job = made_job(plane, kernel, x, aligned, z)
    assert lib.run_pool(ctypes.byref(job), IMAGES, 1) == 0
    torch.testing.assert_close(z.double(), z64.detach(), rtol=2**-23, atol=0)

    dz = in_slice(drawn(5, IMAGES, plane.channels, *out, dtype=torch.float32))
    ones = torch.ones(1, 1, plane.rows, plane.cols)
    covered = F.avg_pool2d(ones, 3, stride, 1, divisor_override=1)
    dx = torch.full(x.shape, torch.nan)
    shares = in_slice(dz / covered)
    job = made_job(plane, kernel, shares, aligned, dx, transposed=True)
    assert lib.run_pool_back(ctypes.byref(job), IMAGES) == 0
    close(dx, torch.autograd.grad(z64, x64, dz.double())[0])


@pytest.mark.parametrize("plane", PLANES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_max_pool_with_ties(lib: ctypes.CDLL, stride: int, plane: Plane) -> None:
    dtype, aligned = case(PLANES.index(plane) + stride + 1)
    out, kernel = plane.out(stride), (3, 1, stride)
    x = in_slice(drawn(6, IMAGES, plane.channels, plane.rows, plane.cols, dtype=dtype).round())
    x[0, 0].fill_(-torch.inf)
    z64, index = F.max_pool2d(x.double(), 3, stride, 1, return_indices=True)
    z, winner = torch.full((2, IMAGES, plane.channels, *out), torch.nan)
    job = made_job(plane, kernel, x, aligned, z, other=winner)
    assert lib.run_pool(ctypes.byref(job), IMAGES, 0) == 0
    torch.testing.assert_close(z.double(), z64, rtol=0, atol=0)
    rows = torch.arange(out[0])[:, None] * stride - 1 + winner.long() // 3
    cols = torch.arange(out[1]) * stride - 1 + winner.long() % 3
    torch.testing.assert_close(rows * plane.cols + cols, index)

    dz = in_slice(drawn(7, IMAGES, plane.channels, *out, dtype=torch.float32))
    dx, won = torch.full(x.shape, torch.nan), in_slice(winner)
    job = made_job(plane, kernel, dz, aligned, dx, beside=won, transposed=True)
    assert lib.run_pool_back(ctypes.byref(job), IMAGES) == 0
    want = torch.zeros(IMAGES, plane.channels, plane.rows * plane.cols, dtype=torch.float64)
    want.scatter_add_(2, index.flatten(2), dz.double().flatten(2))
    close(dx, want.reshape(x.shape))


def test_nan_and_inf_stay(lib: ctypes.CDLL) -> None:
    plane = Plane(1, 16, 16, 16)
    x = drawn(8, IMAGES, 1, 16, 16, dtype=torch.float32).abs()
    x[0, 0, 5, 6], x[1, 0, 3, 3], x[1, 0, 12, 12] = torch.nan, torch.inf, -torch.inf
    taps = drawn(9, 1, 1, 3, 3, dtype=torch.float32)
    u, z, winner = torch.full((3, IMAGES, 1, 16, 16), torch.nan)
    job = made_job(plane, (3, 1, 1), x, True, u, taps=taps)
    assert lib.run_convolve(ctypes.byref(job), IMAGES) == 0
    torch.testing.assert_close(u, convolved(x, taps, 1, 1), equal_nan=True)
    job = made_job(plane, (3, 1, 1), x, True, z, other=winner)
    assert lib.run_pool(ctypes.byref(job), IMAGES, 0) == 0
    torch.testing.assert_close(z, F.max_pool2d(x, 3, 1, 1), rtol=0, atol=0, equal_nan=True)
    assert lib.run_pool(ctypes.byref(job), IMAGES, 1) == 0
    want = F.avg_pool2d(x.double(), 3, 1, 1, count_include_pad=False)
    torch.testing.assert_close(z.double(), want, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("side", [8, 16, 32])
def test_quads_of_eight_lanes_lie_in_different_banks(
    lib: ctypes.CDLL, side: int, size: int, transposed: bool, stride: int
) -> None:
    """Shared memory gives eight lanes 16 bytes at once if these lie in eight groups of banks."""
    rows = side if transposed else side * stride
    plane = Plane(64, rows, rows, min(side, 16))
    grid = torch.zeros(1, 64, *(plane.out(stride) if transposed else (rows, rows)))
    job = made_job(plane, (size, 1, stride), grid, True, None, transposed=transposed)
    places = torch.empty(32, dtype=torch.int32)
    assert lib.run_places(ctypes.byref(job), ctypes.c_void_p(places.data_ptr())) == 0
    assert places.unique().numel() == 32
    banks = (places % 32 // 4).reshape(4, 8)
    at_once = torch.tensor([row.unique().numel() for row in banks])
    assert (places % 4 == 0).all()
    # Two cases share banks. 32 columns of output at stride 2 lie over 64 of input, twice around the
    # banks; and du of 8 columns under 16 would want channels in order, as du at stride 1 does not.
    shared = stride == 2 and side == (16 if transposed else 32)
    assert (at_once == (4 if shared else 8)).all(), banks
