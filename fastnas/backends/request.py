"""What the chooser is asked: one op on one device, dtype and number of terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True, eq=False)
class OpInfo:
    """A row of the op table (`fastnas.ops.table`)."""

    stem: str
    summary: str
    dtypes: Mapping[str, tuple[torch.dtype, ...]]
    """Backend to the dtypes that it computes; a backend that is not here has no kernel."""
    max_terms: int
    """Terms that the compiled and Triton kernels take; eager takes any number."""
    absent: Mapping[str, str]
    """Backend to the reason why it has no kernel."""


class Request(NamedTuple):
    """One op on tensors of one kind of device ("cpu", "cuda") and dtype."""

    op: OpInfo
    device: str
    dtype: torch.dtype
    terms: int = 1

    def refusal(self, backend: str, device: str) -> str | None:
        """Why `backend`, which computes on `device`, cannot serve this by the op table, or None."""
        if backend not in self.op.dtypes:
            return self.op.absent.get(backend, f"{self.op.stem} has no kernel on {backend}")
        if self.device != device:
            return f"the tensors are on {self.device}, {backend} computes on {device}"
        if self.dtype not in self.op.dtypes[backend]:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in self.op.dtypes[backend])
            given = str(self.dtype).removeprefix("torch.")
            return f"{self.op.stem} has no {given} kernel on {backend}, only {allowed}"
        if self.terms > self.op.max_terms:
            return f"{self.terms} terms; the {backend} kernel takes {self.op.max_terms}"
        return None
