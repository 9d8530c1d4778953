"""Where the op tests run: every backend, and why one cannot run here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fastnas import backends
from fastnas.backends import BACKENDS
from fastnas.backends.eager import EagerBackend
from fastnas.backends.op_table import register
from fastnas.backends.registry import forget_choices
from fastnas.ops import OPS


@dataclass(frozen=True)
class Target:
    """A backend on a device. `table` is the backend whose dtypes it has in the op table."""

    id: str
    name: str
    device: str
    table: str

    def why_not(self) -> str | None:
        """Why nothing can run on it here, or None."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        if self.id == "triton-interpreter" and os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton compiles for the CUDA device here"
        if self.name in BACKENDS:
            return BACKENDS[self.name].unavailable()
        return None

    def dtypes(self, op: str) -> tuple[torch.dtype, ...]:
        return OPS[op].dtypes.get(self.table, ())

    def widest(self, op: str) -> torch.dtype:
        """The dtype that rounds least: float64 where the op has it."""
        return max(self.dtypes(op), key=lambda dtype: torch.finfo(dtype).bits)

    def some_dtypes(self, op: str, turn: int) -> tuple[torch.dtype, ...]:
        """Returns all dtypes, or where a kernel is interpreted, which is slow, one in turn."""
        return (self.in_turn(op, turn),) if self.id == "triton-interpreter" else self.dtypes(op)

    def in_turn(self, op: str, turn: int) -> torch.dtype:
        """Returns the dtype whose turn it is, for cases that multiply: together they have all."""
        every = self.dtypes(op)
        return every[turn % len(every)]


TARGETS = (
    Target("eager", "eager", "cpu", "eager"),
    Target("cpu", "cpu", "cpu", "cpu"),
    Target("cuda-host", "cuda-host", "cpu", "cuda"),
    Target("triton-interpreter", "triton", "cpu", "triton"),
    Target("cuda", "cuda", "cuda", "cuda"),
    Target("triton", "triton", "cuda", "triton"),
)
# Everything but eager, for what only a kernel promises.
KERNELS = tuple(target.name for target in TARGETS if target.name != "eager")


@contextmanager
def registered(backend: Any, kernels: Mapping[str, Any], table: str) -> Iterator[str]:
    """Lets `backend` be chosen by its name, with these kernels, for the dtypes that `table` has."""
    name = backend.name
    assert name not in BACKENDS
    BACKENDS[name] = backend
    for op, kernel in kernels.items():
        register(op, name, kernel, OPS[op].dtypes[table])
    try:
        yield name
    finally:
        del BACKENDS[name]
        for op in kernels:
            del backends.KERNELS[op, name]
            del OPS[op].dtypes[name]
        forget_choices()


class _UnderTest(EagerBackend):
    name = "under-test"


@contextmanager
def under_test(op: str, kernel: Any) -> Iterator[str]:
    """Lets a kernel be chosen in place of the eager one, which it spoils."""
    with registered(_UnderTest(), {op: kernel}, table="eager") as name:
        yield name
