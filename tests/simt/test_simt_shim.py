"""The host SIMT shim itself: what it computes, and that it fails where CUDA kernels are wrong."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
SOURCE = HERE / "selftest.cu"
INCLUDE = HERE.parents[1] / "csrc" / "cuda"
GXX = shutil.which("g++")
NVCC = shutil.which("nvcc")
SEEDS = range(8)
LAUNCH_FAILED = 719
MISALIGNED = 716

needs_gxx = pytest.mark.skipif(GXX is None, reason="no g++")


def build(target: Path, *flags: str) -> Path:
    command = [str(GXX), "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command += ["-x", "c++", "-DFASTNAS_HOST_SIMT", f"-I{INCLUDE}", "-shared", "-fPIC", *flags]
    result = subprocess.run(
        [*command, str(SOURCE), "-o", str(target)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return target


@pytest.fixture(scope="module", params=["native", "ucontext"])
def lib(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if GXX is None:
        pytest.skip("no g++")
    flags = ["-DHOST_SIMT_UCONTEXT"] if request.param == "ucontext" else []
    path = tmp_path_factory.mktemp("simt") / f"selftest_{request.param}.so"
    library = ctypes.CDLL(str(build(path, *flags)))
    library.host_simt_seed.argtypes = [ctypes.c_uint64]
    library.host_simt_seed.restype = None
    library.failed_kernel_name.restype = ctypes.c_char_p
    library.host_simt_seed(0)
    return library


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def outcomes(lib: ctypes.CDLL, launch: Callable[[], np.ndarray]) -> list[np.ndarray]:
    results = []
    for seed in SEEDS:
        lib.host_simt_seed(seed)
        results.append(launch())
    return results


def tree_sum(lib: ctypes.CDLL, x: np.ndarray, synced: bool) -> np.ndarray:
    sums = np.full(5, np.nan, np.float32)
    assert lib.run_tree_sum(len(sums), synced, pointer(x), len(x), pointer(sums)) == 0
    return sums


def test_block_reduction_is_right_for_every_seed(lib: ctypes.CDLL) -> None:
    x = np.random.default_rng(1).integers(-50, 50, 3001).astype(np.float32)
    per_block = np.pad(x, (0, -len(x) % (5 * 256))).reshape(-1, 5, 256).sum((0, 2))
    for sums in outcomes(lib, lambda: tree_sum(lib, x, True)):
        np.testing.assert_array_equal(sums, per_block)


def test_removed_barrier_gives_a_wrong_sum(lib: ctypes.CDLL) -> None:
    x = np.random.default_rng(2).integers(1, 50, 3001).astype(np.float32)
    right = tree_sum(lib, x, True)
    wrong = [
        not np.array_equal(sums, right) for sums in outcomes(lib, lambda: tree_sum(lib, x, False))
    ]
    assert any(wrong)


def two_sums(lib: ctypes.CDLL, synced: bool) -> np.ndarray:
    sums = np.full((256, 2), np.nan, np.float32)
    assert lib.run_two_sums(synced, pointer(sums)) == 0
    return sums


def test_removed_barrier_between_two_uses_of_an_array_gives_a_wrong_sum(lib: ctypes.CDLL) -> None:
    right = np.broadcast_to(np.array([256, 768], np.float32), (256, 2))
    assert all(np.array_equal(s, right) for s in outcomes(lib, lambda: two_sums(lib, True)))
    assert not all(np.array_equal(s, right) for s in outcomes(lib, lambda: two_sums(lib, False)))


def test_a_launch_depends_on_the_seed_only(lib: ctypes.CDLL) -> None:
    x = np.random.default_rng(3).integers(1, 50, 3001).astype(np.float32)
    once = outcomes(lib, lambda: tree_sum(lib, x, False))
    np.testing.assert_array_equal(once, outcomes(lib, lambda: tree_sum(lib, x, False)))


def test_unwritten_shared_memory_is_poison_in_every_block(lib: ctypes.CDLL) -> None:
    floats, doubles = np.zeros((2, 64), np.float32), np.zeros((2, 64))
    ints = np.zeros((2, 64), np.int32)
    assert lib.run_read_unwritten(pointer(floats), pointer(doubles), pointer(ints)) == 0
    assert (floats[:, ::2] == 1).all()
    assert (ints[:, ::2] == 2).all()
    assert (doubles[:, ::2] == 3).all()
    assert np.isnan(floats[:, 1::2]).all()
    assert np.isnan(doubles[:, 1::2]).all()
    assert (ints[:, 1::2] == -1).all()


@pytest.mark.parametrize("threads", [1, 31, 32, 40, 256, 1000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_warp_sums(lib: ctypes.CDLL, threads: int, dtype: type) -> None:
    x = np.random.default_rng(4).integers(-50, 50, threads).astype(dtype)
    sums = np.full((threads + 31) // 32, np.nan, dtype)
    run = lib.run_warp_sums_float if dtype is np.float32 else lib.run_warp_sums_double
    assert run(threads, pointer(x), pointer(sums)) == 0
    np.testing.assert_array_equal(sums, np.add.reduceat(x, range(0, threads, 32)))


def test_shuffle_from_a_lane_that_does_not_exist_is_poison(lib: ctypes.CDLL) -> None:
    out = np.zeros(40, np.float32)
    assert lib.run_read_missing_lane(40, pointer(out)) == 0
    assert np.isnan(out[39])
    assert (out[:39] == 1).all()


def test_every_warp_operation(lib: ctypes.CDLL) -> None:
    out = np.zeros((12, 32), np.int32)
    assert lib.run_every_warp_operation(pointer(out)) == 0
    lane = np.arange(32)
    threes = sum(1 << int(i) for i in lane[::3])
    expected = [
        np.full(32, 5),
        lane // 8 * 8 + (lane + 1) % 8,
        np.where(lane >= 3, lane - 3, lane),
        np.where(lane % 8 >= 3, lane - 3, lane),
        np.where(lane < 29, lane + 3, lane),
        np.where(lane % 8 < 5, lane + 3, lane),
        lane ^ 6,
        # Only a source in a later segment falls back to the own lane.
        np.where((lane ^ 12) <= (lane | 7), lane ^ 12, lane),
        np.full(32, threes),
        np.full(32, 1),
        np.full(32, 0),
        np.where(lane < 16, lane ^ 1, lane ^ 2),
    ]
    np.testing.assert_array_equal(out, np.array(expected).astype(np.uint32).astype(np.int32))


def test_threads_that_exited_count_as_arrived(lib: ctypes.CDLL) -> None:
    out = np.zeros((2, 64), np.int32)
    assert lib.run_misused(0, pointer(out)) == 0
    np.testing.assert_array_equal(out, np.broadcast_to(np.arange(64) < 32, (2, 64)))


@pytest.mark.parametrize(
    ("way", "message"),
    [
        (1, "divergent barrier"),
        (2, "divergent barrier"),
        (3, "shuffle names a lane that has exited"),
        (4, "warp operation never joined"),
        (5, "lane outside its own mask"),
    ],
)
def test_threads_that_can_not_meet_are_reported(
    lib: ctypes.CDLL, way: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    out = np.zeros((2, 64), np.int32)
    for seed in SEEDS:
        lib.host_simt_seed(seed)
        assert lib.run_misused(way, pointer(out)) == LAUNCH_FAILED
        error = capfd.readouterr().err
        assert message in error
        assert "selftest.cu:" in error
        assert b"misused" in lib.failed_kernel_name()
    lib.host_simt_seed(0)
    test_threads_that_exited_count_as_arrived(lib)


def test_last_arriver(lib: ctypes.CDLL) -> None:
    blocks = 9
    x = np.random.default_rng(5).integers(-50, 50, blocks * 256).astype(np.float32)
    partial, arrived = np.full(blocks, np.nan, np.float32), np.zeros(1, np.uint32)
    for seed in SEEDS:
        lib.host_simt_seed(seed)
        total = np.full(1, np.nan, np.float32)
        arguments = [pointer(a) for a in (x, partial, arrived, total)]
        assert lib.run_last_arriver_sum(blocks, *arguments) == 0
        assert total[0] == x.sum()
        assert arrived[0] == 0


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_asynchronous_copies_land_when_they_are_waited_for(lib: ctypes.CDLL, kept: int) -> None:
    rows = 5
    x = np.random.default_rng(6).integers(-50, 50, (rows, 32, 4)).astype(np.float32)
    sums = np.zeros(32, np.float32)
    assert lib.run_sum_rows(kept, pointer(x), rows, pointer(sums)) == 0
    if kept == 2:  # one group too many is on its way
        assert np.isnan(sums).all()
    else:
        np.testing.assert_array_equal(sums, np.roll(x.sum((0, 2)), -1))


@pytest.mark.parametrize(
    ("way", "code", "message"),
    [
        (0, MISALIGNED, "misaligned asynchronous copy"),
        (1, MISALIGNED, "misaligned asynchronous copy"),
        (2, LAUNCH_FAILED, "not shared memory"),
        (3, 0, ""),
    ],
)
def test_asynchronous_copies_that_a_gpu_refuses(
    lib: ctypes.CDLL, way: int, code: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    x, to = np.arange(64, dtype=np.float32), np.zeros(1, np.float32)
    first = -x.ctypes.data % 16 // 4
    assert lib.run_copy_wrongly(way, pointer(x[first:]), pointer(to)) == code
    error = capfd.readouterr().err
    assert message in error
    assert ("selftest.cu:" in error) == bool(message)
    assert code or to[0] == first + 1


def test_rectifier_keeps_nan(lib: ctypes.CDLL) -> None:
    x = np.array([-np.inf, -1, -0.0, 0, 2, np.inf, np.nan], np.float32)
    assert lib.run_rectify(len(x), pointer(x)) == 0
    np.testing.assert_array_equal(x, np.array([0, 0, 0, 0, 2, np.inf, np.nan], np.float32))
    assert not np.signbit(x[:3]).any()


def test_vectors_and_a_counter_that_wraps(lib: ctypes.CDLL) -> None:
    whole = np.arange(32 * 4 + 4, dtype=np.float32)
    first = -whole.ctypes.data % 16 // 4
    x, to = whole[first:][: 32 * 4].reshape(32, 4), np.zeros(32 * 4 + 4, np.float32)
    bits, counter = np.arange(64, dtype=np.uint32).reshape(32, 2), np.zeros(1, np.uint32)
    to = to[-to.ctypes.data % 16 // 4 :][: 32 * 4].reshape(32, 4)
    assert lib.run_read_vectors(pointer(x), pointer(bits), pointer(counter), pointer(to)) == 0
    added = np.pad(bits, ((0, 0), (1, 1))).astype(np.float32)
    np.testing.assert_array_equal(to, np.roll(x, 1, 1) + added)
    assert counter[0] == 32 % 10


def test_large_parameters_by_value_and_more_than_one_dimension(lib: ctypes.CDLL) -> None:
    n = 6 * 32 - 5
    x, y = np.arange(n, dtype=np.float32), np.zeros(n + 5, np.float32)
    assert lib.run_sum_table(pointer(x), pointer(y), ctypes.c_int64(n)) == 0
    np.testing.assert_array_equal(y[:n], 2 * 250 * x)
    assert (y[n:] == 0).all()


@pytest.mark.parametrize(
    ("grid", "block", "shared_bytes", "code"),
    [(1, 32, 0, 0), (0, 32, 0, 9), (1, 0, 0, 9), (1, 1025, 0, 9), (1, 32, 227 << 10, 0),
     (1, 32, 228 << 10, 1)],
)  # fmt: skip
def test_sizes_that_cuda_refuses(
    lib: ctypes.CDLL, grid: int, block: int, shared_bytes: int, code: int
) -> None:
    out = np.zeros(32, np.float32)
    assert lib.run_sized(grid, block, ctypes.c_size_t(shared_bytes), pointer(out)) == code


def test_speed_is_reported(
    lib: ctypes.CDLL, record_property: Callable[[str, object], None]
) -> None:
    out = np.zeros(64, np.float32)
    start = time.perf_counter()
    assert lib.run_eleven_barriers(pointer(out)) == 0
    milliseconds = 1e3 * (time.perf_counter() - start)
    assert (out == 11).all()
    record_property("milliseconds", round(milliseconds, 1))
    print(f"64 blocks x 256 threads x 11 barriers: {milliseconds:.1f} ms")


SANITIZED = """
import ctypes, sys
lib = ctypes.CDLL(sys.argv[1])
buffer = (ctypes.c_float * 512)()
assert lib.run_misused(1, buffer) == 719
assert lib.run_two_sums(1, buffer) == 0
print("still fine", flush=True)
if sys.argv[2] == "shared":
    lib.run_write_past_shared(buffer)
else:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    lib.run_write_past_the_end(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(64))), 16)
"""


@needs_gxx
def test_address_sanitizer_sees_what_kernels_write(tmp_path: Path) -> None:
    runtime = subprocess.run(
        [str(GXX), "-print-file-name=libasan.so"], capture_output=True, text=True
    )
    if not Path(runtime.stdout.strip()).is_absolute():
        pytest.skip("g++ without libasan")
    library = build(tmp_path / "sanitized.so", "-g", "-fsanitize=address")
    environment = {"LD_PRELOAD": runtime.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    for where in ("shared", "global"):
        result = subprocess.run(
            [sys.executable, "-c", SANITIZED, str(library), where],
            capture_output=True, text=True, env=environment,
        )  # fmt: skip
        assert "still fine" in result.stdout, result.stderr
        assert "heap-buffer-overflow" in result.stderr, result.stderr


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_nvcc_compiles_the_same_source(tmp_path: Path) -> None:
    command = [str(NVCC), "-std=c++17", "-arch=sm_90", f"-I{INCLUDE}", "-c", str(SOURCE)]
    result = subprocess.run(
        [*command, "-o", str(tmp_path / "selftest.o")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
