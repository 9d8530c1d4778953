"""The checking builds of the host shim: planted races and misaligned accesses are each found."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import test_strips
from host_cuda import CSRC, build_host

SOURCE = Path(__file__).parent / "planted.cu"
SEEDS = range(4)
LAUNCH_FAILED = 719
MISALIGNED = 716

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def planted(folder: Path, checks: str) -> Path:
    target = folder / f"planted_{checks}.so"
    flags = ["-Wall", "-Wextra", "-Werror", "-fvisibility=default", f"-I{CSRC / 'cuda'}", "-O0"]
    build_host([SOURCE], target, *flags, checks=checks)
    return target


@pytest.fixture(scope="module")
def races(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = ctypes.CDLL(str(planted(tmp_path_factory.mktemp("races"), "races")))
    library.host_simt_seed.argtypes = [ctypes.c_uint64]
    return library


def buffer() -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * 1024)()


RACES = {
    "missing_block_barrier": ("shared", "writes it", "reads it"),
    "missing_warp_barrier": ("shared", "writes it", "reads it"),
    "tile_used_again": ("shared", "writes it", "reads it"),
    "blocks_write_one_word": ("global", "writes it", "writes it"),
    "block_reads_without_the_counter": ("global", "writes it", "reads it"),
    "counters_in_two_steps": ("global", "writes it", "reads it"),
    "copy_waited_for_too_late": ("shared", "reads it", "copies to it"),
    "copy_read_by_its_own_thread": ("shared", "reads it", "copies to it"),
    "copy_over_what_is_read": ("shared", "reads it", "awaits a copy to it"),
}
THREAD = r"block \(\d,0,0\) thread \(\d+,0,0\)"
RACE = re.compile(
    rf"race in .*?(\w+)<\w+(?:, \w+)?>\(.*: the word at \w+ of (\w+) memory; "
    rf"({THREAD}) ([a-z ]+) at \S*planted\.cu:\d+.*; ({THREAD}) ([a-z ]+) at \S*planted\.cu:\d+"
)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", RACES)
def test_planted_race_is_found(
    races: ctypes.CDLL, name: str, seed: int, capfd: pytest.CaptureFixture[str]
) -> None:
    races.host_simt_seed(seed)
    run = races[f"{name}_run"]
    assert run(1, buffer()) == 0
    assert capfd.readouterr().err == ""
    assert run(0, buffer()) == LAUNCH_FAILED
    told = capfd.readouterr().err
    found = RACE.search(told)
    assert found, told
    kernel, memory, one, did, other, had_done = found.groups()
    assert (kernel, memory, *sorted([did, had_done], reverse=True)) == (name, *RACES[name])
    assert (one != other) == (name != "copy_read_by_its_own_thread")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_counter_orders_blocks_by_fences_on_both_sides(
    races: ctypes.CDLL, seed: int, capfd: pytest.CaptureFixture[str]
) -> None:
    races.host_simt_seed(seed)
    for before, behind in ((1, 1), (0, 1), (1, 0)):
        ordered = before and behind
        code = races.counter_without_a_fence_run(before, behind, buffer())
        assert code == (0 if ordered else LAUNCH_FAILED)
        assert bool(RACE.search(capfd.readouterr().err)) == (not ordered)


def test_halves_of_a_word_are_no_race(races: ctypes.CDLL) -> None:
    halves = np.zeros(256, np.uint16)
    assert races.halves_of_words_run(ctypes.c_void_p(halves.ctypes.data)) == 0
    np.testing.assert_array_equal(halves, np.tile(np.arange(64), 4))


@pytest.fixture(scope="module")
def misaligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted(tmp_path_factory.mktemp("misaligned"), "alignment")


ONE_ACCESS = """
import ctypes, sys
lib = ctypes.CDLL(sys.argv[1])
memory = (ctypes.c_char * 256)()
aligned = ctypes.addressof(memory) + -ctypes.addressof(memory) % 64
print(lib.misaligned_run(int(sys.argv[2]), int(sys.argv[3]), ctypes.c_void_p(aligned)))
"""


def one_access(library: Path, way: int, off: int) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which a misaligned access ends."""
    environment = {**os.environ, "UBSAN_OPTIONS": ""}
    command = [sys.executable, "-c", ONE_ACCESS, str(library), str(way), str(off)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    ("way", "off", "aligned"),
    [(0, 4, 16), (1, 8, 16), (2, 4, 8), (3, 2, 4)],
    ids=["float4", "uint4", "float2", "half pair"],
)
def test_planted_misaligned_access_is_found(
    misaligned: Path, way: int, off: int, aligned: int
) -> None:
    assert one_access(misaligned, way, aligned).stdout == "0\n"
    faulty = one_access(misaligned, way, off)
    assert faulty.returncode != 0
    pattern = rf"planted\.cu:\d+:\d+: runtime error: .*misaligned address .* {aligned} byte"
    assert re.search(pattern, faulty.stderr), faulty.stderr


def test_misaligned_source_of_an_asynchronous_copy_is_found(misaligned: Path) -> None:
    assert one_access(misaligned, 4, 16).stdout == "0\n"
    faulty = one_access(misaligned, 4, 4)
    assert faulty.stdout == f"{MISALIGNED}\n"
    assert "misaligned asynchronous copy" in faulty.stderr


@pytest.mark.parametrize("checks", ["alignment", "races"])
def test_strips_are_clean(checks: str, tmp_path: Path) -> None:
    """The part of mixed_edges that stages, asynchronously and in vectors; `make simt` runs all."""
    # Optimising would take three times as long as all that is run.
    lib = test_strips.built_strips(tmp_path / "strips.so", "-O0", checks=checks)
    for index in (1, 5, 9):  # odd, tiles with a rest, wide rows
        plane = test_strips.PLANES[index]
        for kernel in ((3, 1, 1), (5, 2, 2)):
            test_strips.test_convolution_and_gradients(lib, kernel, plane)
        for stride in (1, 2):
            test_strips.test_average_pool(lib, stride, plane)
