"""Where the op tests run: every backend, and why one cannot run here."""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch

from fastnas.backends import BACKENDS
from fastnas.backends.chooser import forget_choices
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
        """All dtypes, or where a kernel is interpreted, which is slow, the next one in turn."""
        every = self.dtypes(op)
        return (every[turn % len(every)],) if self.id == "triton-interpreter" else every


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
def registered(backend: Any, table: str) -> Iterator[str]:
    """`backend` can be chosen by its name, for the dtypes that `table` has in the op table."""
    name = backend.name
    assert name not in BACKENDS
    BACKENDS[name] = backend
    tables = [cast(MutableMapping[str, Any], op.dtypes) for op in OPS.values()]
    for dtypes in tables:
        if table in dtypes:
            dtypes[name] = dtypes[table]
    try:
        yield name
    finally:
        del BACKENDS[name]
        for dtypes in tables:
            dtypes.pop(name, None)
        forget_choices()
