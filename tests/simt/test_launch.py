"""launch() on CUDA: what it asks of the runtime, against one that writes down its calls."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
GXX = shutil.which("g++")
ILLEGAL_ADDRESS = 700
LAUNCH_FAILED = 719
LAUNCH = "launch 3 64 "


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if GXX is None:
        pytest.skip("no g++")
    target = tmp_path_factory.mktemp("launch") / "launching.so"
    command = [GXX, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-x", "c++", "-pthread"]
    command += ["-D__CUDACC__", f"-I{HERE / 'fake_cuda'}", f"-I{CUDA}", "-shared", "-fPIC"]
    result = subprocess.run(
        [*command, str(HERE / "launching.cu"), "-o", str(target)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return target


class Runtime:
    def __init__(self, path: Path) -> None:
        self.lib = ctypes.CDLL(str(path))
        self.lib.calls.restype = ctypes.c_char_p
        self.lib.failed_kernel_name.restype = ctypes.c_char_p

    def set_up(
        self, *, device: int = 0, capturing: bool = False, refusal: int = 0, fault: int = 0
    ) -> None:
        self.lib.set_up(device, capturing, refusal, fault)

    def run(self, shared: int, *, other: bool = False, argument: int = 0) -> int:
        code: int = self.lib.run(other, ctypes.c_size_t(shared), argument)
        return code

    def calls(self) -> list[str]:
        text: bytes = self.lib.calls()
        return text.decode().splitlines()

    def failed(self) -> str:
        name: bytes = self.lib.failed_kernel_name()
        return name.decode()


@pytest.fixture
def runtime(built: Path, tmp_path: Path) -> Runtime:
    """Loaded anew for each test: what a kernel may have is remembered for the process."""
    return Runtime(Path(shutil.copy(built, tmp_path)))


def test_a_launch_passes_its_arguments(runtime: Runtime) -> None:
    runtime.set_up()
    assert runtime.run(1024, argument=77) == 0
    assert runtime.calls() == [LAUNCH + "1024"]
    assert runtime.lib.first_argument() == 77


def test_shared_memory_is_allowed_once_and_never_lowered(runtime: Runtime) -> None:
    runtime.set_up()
    for size in (60000, 50000, 60000, 70000, 41000):
        assert runtime.run(size) == 0
    allowed = [call for call in runtime.calls() if call.startswith("allow")]
    assert allowed == ["allow 60000", "allow 70000"]


def test_every_kernel_and_device_is_allowed_its_own(runtime: Runtime) -> None:
    for device, other in ((0, False), (0, True), (1, False), (1, True)):
        for allowed in (["allow 50000"], []):
            runtime.set_up(device=device)
            assert runtime.run(50000, other=other) == 0
            assert runtime.calls() == [*allowed, LAUNCH + "50000"]


def test_a_refused_size_is_no_high_water_mark(runtime: Runtime) -> None:
    runtime.set_up()
    assert runtime.run(300 << 10) == 1
    assert runtime.run(300 << 10) == 1
    assert runtime.calls().count(f"allow {300 << 10}") == 2
    assert not any(call.startswith("launch") for call in runtime.calls())
    assert runtime.run(50000) == 0
    assert runtime.lib.pending_error() == 0


def test_threads_only_raise_it(runtime: Runtime) -> None:
    runtime.set_up()
    runtime.lib.run_together(8, 500)
    sizes = [int(call.split()[1]) for call in runtime.calls()]
    assert len(sizes) > 1
    assert sizes == sorted(set(sizes))


def test_a_refused_launch_is_named_and_leaves_no_error_behind(runtime: Runtime) -> None:
    runtime.set_up(refusal=1)
    assert runtime.run(0) == 1
    assert runtime.failed() == "fastnas::kernel(int)"
    assert runtime.lib.pending_error() == 0


def test_without_the_switch_nothing_waits(runtime: Runtime) -> None:
    runtime.set_up(fault=ILLEGAL_ADDRESS)
    assert runtime.run(0) == 0
    assert runtime.calls() == [LAUNCH + "0"]


def under_switch(program: str, *arguments: object) -> str:
    """The switch is read once in a process, so in one of its own."""
    result = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, "FASTNAS_CUDA_SYNC": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


FAULT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_launch import Runtime
runtime = Runtime(Path(sys.argv[2]))
runtime.set_up(fault=0 if sys.argv[3] == "capture" else 700, capturing=sys.argv[3] == "capture")
print(runtime.run(0), runtime.calls(), runtime.failed(), runtime.lib.pending_error(), sep="|")
"""


def test_the_switch_tells_the_kernel_of_a_fault(built: Path) -> None:
    calls = ["name", LAUNCH + "0", "synchronize"]
    told = under_switch(FAULT, HERE, built, "fault").strip()
    assert told == f"{ILLEGAL_ADDRESS}|{calls}|fastnas::kernel(int)|0"


def test_the_switch_waits_for_no_stream_that_is_captured(built: Path) -> None:
    told = under_switch(FAULT, HERE, built, "capture")
    assert told.startswith(f"0|{['name', LAUNCH + '0']}|")


ON_THE_SHIM = """
import sys
sys.path.insert(0, sys.argv[1])
import ctypes
from test_simt_shim import build
from pathlib import Path
lib = ctypes.CDLL(str(build(Path(sys.argv[2]))))
lib.failed_kernel_name.restype = ctypes.c_char_p
print(lib.run_misused(1, (ctypes.c_int * 128)()), lib.failed_kernel_name().decode(), sep="|")
"""


@pytest.mark.skipif(GXX is None, reason="no g++")
def test_the_switch_names_the_kernel_on_the_shim(tmp_path: Path) -> None:
    told = under_switch(ON_THE_SHIM, HERE, tmp_path / "selftest.so").strip()
    assert told == f"{LAUNCH_FAILED}|misused(int, int*)"
