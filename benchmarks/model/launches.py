"""Sees the launches of the CUDA backend as it runs on the host, without running their blocks."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from fastnas.benchmarks.model.machine import Shape
from fastnas.benchmarks.model.toolchain import demangle, run_tool

OBSERVER = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_ubyte), ctypes.c_size_t,
)  # fmt: skip


class Launch(NamedTuple):
    """Holds one launch: which kernel, and what CUDA would get with it."""

    kernel: str
    shape: Shape


@contextmanager
def observed(library: Path, see: Callable[[Launch], bool]) -> Iterator[None]:
    """Hands every launch of a library of host kernels to `see`, which says whether it is done.

    Args:
        library: the module that tests/host_cuda.py builds of csrc/cuda.
    """
    names = kernel_names(library)
    handle = ctypes.CDLL(str(library))
    failures: list[BaseException] = []

    def observer(kernel: int, sizes: list[int], shared: int, parameters: object, size: int) -> int:
        x, y, z, *block = sizes[:6]
        given = bytes(parameters[:size])  # type: ignore[index]
        shape = Shape((x, y, z), (block[0], block[1], block[2]), shared, given)
        try:
            return int(see(Launch(names[kernel - base], shape)))
        except BaseException as error:  # ctypes would print it and go on
            failures.append(error)
            return 1

    seed = next(at for at, name in names.items() if name == "host_simt_seed")
    base = ctypes.cast(handle.host_simt_seed, ctypes.c_void_p).value or 0
    base -= seed
    called = OBSERVER(observer)
    handle.host_simt_observe(called)
    try:
        yield
    finally:
        handle.host_simt_observe(None)
    if failures:
        raise failures[0]


@lru_cache
def kernel_names(library: Path) -> dict[int, str]:
    """Maps the offsets of functions in a library to their names."""
    symbols = [line.split() for line in run_tool("nm", "--defined-only", str(library)).splitlines()]
    functions = [(int(at, 16), name) for at, kind, name in symbols if kind in "tTW"]
    return dict(zip((at for at, _ in functions), demangle([name for _, name in functions])))
