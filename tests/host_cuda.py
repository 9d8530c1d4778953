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
from fastnas.backends.native import Native, allows_tf32
from fastnas.backends.native_cells import NativeEdges
from fastnas.backends.native_sums import NativeNormSum, NativePaths, NativeSum
from fastnas.backends.relu_conv_bn import MatmulConv

CSRC = Path(__file__).parents[1] / "csrc"
MODULE = "fastnas_host_simt"
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
FLAGS += ["-DFASTNAS_HOST_SIMT", f"-DFASTNAS_MODULE={MODULE}"]


class HostCudaBackend(Native):
    """csrc/cuda on the CPU. `seed` picks the order in which the shim runs blocks and threads."""

    def __init__(self, module: ModuleType) -> None:
        super().__init__("cuda-host", "cpu", module)
        norm_sum = NativeNormSum(self)
        self.kernels = {
            "mixed_sum": NativeSum(self),
            "mixed_norm_sum": norm_sum,
            "mixed_edges": NativeEdges(self, ROWS, takes_choice=True),
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


def load_host_cuda(cache: Path) -> HostCudaBackend | str:
    """The backend, built into `cache` where that does not hold it yet, or why there is none."""
    gxx = shutil.which("g++")
    if gxx is None:
        return "no g++"
    try:
        import pybind11
    except ImportError:
        return "pybind11 is not installed"
    flags = [*FLAGS, f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    sources = [CSRC / "bind_cuda.cpp", *sorted((CSRC / "cuda").glob("*.cu"))]
    read = [*sources, *sorted(CSRC.rglob("*.h"))]
    version = subprocess.run([gxx, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256("\n".join([version, *flags]).encode())
    for path in read:
        key.update(path.name.encode() + path.read_bytes())
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    built = cache / key.hexdigest()[:16] / f"{MODULE}{suffix}"
    built.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{built}.lock"):  # of the workers that need it, one builds
        if not built.exists():
            _build([gxx, *flags], sources, built)
    return HostCudaBackend(_import(built))


def _build(command: list[str], sources: list[Path], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = [f"{folder}/{source.name}.o" for source in sources]
        running = [
            subprocess.Popen(
                [*command, "-x", "c++", "-c", str(source), "-o", compiled],
                stderr=subprocess.PIPE,
                text=True,
            )
            for source, compiled in zip(sources, objects)
        ]
        messages = [process.communicate()[1] for process in running]
        if any(process.returncode for process in running):
            raise RuntimeError("the host build of csrc/cuda failed:\n" + "".join(messages))
        linked = f"{folder}/{target.name}"
        subprocess.run([*command, "-shared", *objects, "-o", linked], check=True)
        os.replace(linked, target)  # whole or not at all, should the session be killed


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
