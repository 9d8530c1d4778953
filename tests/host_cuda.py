"""The CUDA backend run on the host: the .cu files compiled by g++ through the SIMT shim."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from filelock import FileLock
from torch import Tensor

from fastnas.backends.address import ROWS
from fastnas.backends.dense_edges import DenseEdges
from fastnas.backends.native import Native, allows_tf32
from fastnas.backends.native_cells import NativeEdges
from fastnas.backends.native_sums import NativeNormSum, NativePaths, NativeSum
from fastnas.backends.relu_conv_bn import MatmulConv

CSRC = Path(__file__).parents[1] / "csrc"
MODULE = "fastnas_host_simt"
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
FLAGS += ["-DFASTNAS_HOST_SIMT", f"-DFASTNAS_MODULE={MODULE}"]
# What a build looks for while kernels run: the flags of the .cu files. A misaligned access ends the
# process with a line on stderr, a race fails its launch (csrc/cuda/host_simt_races.cpp).
CHECKS = {
    "": [],
    "alignment": ["-O1", "-g1", "-fsanitize=undefined", "-fno-sanitize-recover=all"],
    "races": ["-O1", "-g1", "-fsanitize=thread", "-DHOST_SIMT_RACES"],
}


class HostCudaBackend(Native):
    """csrc/cuda on the CPU. `seed` picks the order in which the shim runs blocks and threads."""

    def __init__(self, module: ModuleType) -> None:
        super().__init__("cuda-host", "cpu", module)
        norm_sum = NativeNormSum(self)
        self.kernels = {
            "mixed_sum": NativeSum(self),
            "mixed_norm_sum": norm_sum,
            "mixed_edges": DenseEdges(NativeEdges(self, ROWS, takes_choice=True), norm_sum),
            "relu_conv_bn": MatmulConv(norm_sum),
            "sample_paths": NativePaths(self),
        }
        library = ctypes.CDLL(str(module.__file__))
        library.host_simt_seed.argtypes = [ctypes.c_uint64]
        library.host_simt_seed.restype = None
        self._library = library

    def launch(self, like: Tensor) -> dict[str, Any]:
        return {}

    def blocks(self, n: int) -> int:
        count: int = self.module.block_count(n)
        return count

    def uses_tf32(self) -> bool:
        return allows_tf32()

    def seed(self, seed: int) -> None:
        self._library.host_simt_seed(seed)


def load_host_cuda(cache: Path, checks: str = "") -> HostCudaBackend | str:
    """The backend, built into `cache` where that does not hold it yet, or why there is none."""
    gxx = shutil.which("g++")
    if gxx is None:
        return "no g++"
    try:
        import pybind11
    except ImportError:
        return "pybind11 is not installed"
    flags = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    sources = [CSRC / "bind_cuda.cpp", *sorted((CSRC / "cuda").glob("*.cu"))]
    read = [*sources, *sorted(CSRC.rglob("*.h")), *beside(checks)]
    version = subprocess.run([gxx, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256("\n".join([version, *FLAGS, *flags, *CHECKS[checks]]).encode())
    for path in read:
        key.update(path.name.encode() + path.read_bytes())
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    built = cache / key.hexdigest()[:16] / f"{MODULE}{suffix}"
    built.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{built}.lock"):  # of the workers that need it, one builds
        if not built.exists():
            build_host(sources, built, *flags, checks=checks)
    return HostCudaBackend(_import(built))


def beside(checks: str) -> list[Path]:
    """The sources that a build with these checks has beside its own."""
    return [CSRC / "cuda" / "host_simt_races.cpp"] if checks == "races" else []


def build_host(sources: list[Path], target: Path, *flags: str, checks: str = "") -> None:
    """Compiles .cu files, and the .cpp files that call them, into a shared library."""
    command = [str(shutil.which("g++")), *FLAGS]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects, running = [], []
        for source in [*sources, *beside(checks)]:
            objects.append(f"{folder}/{source.name}.o")
            own = CHECKS[checks] if source.suffix == ".cu" else _definitions(checks)
            compiling = [*command, *own, *flags, "-x", "c++", "-c", str(source)]
            compiling += ["-o", objects[-1]]
            running.append(subprocess.Popen(compiling, stderr=subprocess.PIPE, text=True))
        messages = [process.communicate()[1] for process in running]
        if any(process.returncode for process in running):
            raise RuntimeError("the host build of CUDA sources failed:\n" + "".join(messages))
        linked = f"{folder}/{target.name}"
        runtime = CHECKS[checks] if checks == "alignment" else []  # races: never libtsan
        subprocess.run([*command, *runtime, "-shared", *objects, "-o", linked], check=True)
        os.replace(linked, target)  # whole or not at all, should the session be killed


def _definitions(checks: str) -> list[str]:
    return [flag for flag in CHECKS[checks] if flag.startswith("-D")]


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
