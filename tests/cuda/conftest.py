"""The machine code of the CUDA kernels, compiled once for all tests, and a machine that runs it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from fastnas.benchmarks.model.machine import load_machine
from fastnas.benchmarks.model.sass import Kernel, read_cubins
from fastnas.benchmarks.model.toolchain import MissingToolError, compile_sources, find_tool

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = ("mixed_edges*.cu", "mixed_sum.cu")
"""mixed_norm_sum.cu has half of all kernels, and would take half of the time."""


@pytest.fixture(scope="session")
def kernels(kept_folder: Callable[[str], Path]) -> Mapping[str, Kernel]:
    """The kernels of `SOURCES` for sm_90, by name."""
    try:
        for tool in ("nvcc", "nvdisasm", "cuobjdump", "c++filt", "nm"):
            find_tool(tool)
    except MissingToolError as error:
        pytest.skip(str(error))
    cubins = compile_sources(CSRC, kept_folder("fastnas_cubins"), SOURCES)
    return {kernel.name: kernel for kernel in read_cubins(cubins)}


@pytest.fixture(scope="session")
def machine(kept_folder: Callable[[str], Path]) -> ctypes.CDLL:
    try:
        return load_machine(kept_folder("fastnas_machine"))
    except MissingToolError as error:
        pytest.skip(str(error))
