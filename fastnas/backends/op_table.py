"""Holds the op table: what an op computes, on which backends, in which dtypes, by what kernel.

A backend enters itself: its module calls `register` for each op that it has a kernel of. Dispatch,
tests, benchmarks and `fastnas info` read the table; nothing else knows which op runs where.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

Call = TypeVar("Call", contravariant=True)


class Kernel(Protocol[Call]):
    """Computes one op on one backend; `Call` is the op's tuple (`fastnas.backends.calls`)."""

    def forward(self, call: Call) -> tuple[Tensor, list[Tensor]]:
        """Returns the output, and the tensors that backward will want beside the call."""
        ...

    def backward(
        self, grad: Tensor, call: Call, saved: list[Tensor], needs: list[bool]
    ) -> list[Tensor]:
        """Returns the gradients that are needed, in the order of the op's leaves.

        Args:
            grad: the gradient of the output.
            call: as forward had it; leaves whose values the needed gradients do not depend on are
                None in it.
            saved: what forward returned for this. It stands after the output itself, where the op
                says that backward reads that (`Op.saves_output`).
            needs: of each leaf, whether its gradient is wanted.
        """
        ...


@dataclass(frozen=True, eq=False)
class OpInfo:
    """Holds a row of the op table."""

    stem: str
    summary: str
    max_terms: int
    """Terms that the compiled and Triton kernels take; eager takes any number."""
    absent: Mapping[str, str] = field(default_factory=dict)
    """Backend to the reason why it has no kernel."""
    dtypes: dict[str, tuple[torch.dtype, ...]] = field(default_factory=dict)
    """Backend to the dtypes that it computes; a backend that is not here has no kernel."""


OPS: dict[str, OpInfo] = {
    op.stem: op
    for op in (
        OpInfo(
            "mixed_sum",
            "y = sum_k w_k x_k, skip noise in place; dw and every dx_k in one pass",
            # This is kMaxTerms of csrc/params.h: 128 pairs of pointers fit the 4 KiB of a kernel's
            # arguments.
            max_terms=128,
        ),
        OpInfo(
            "mixed_norm_sum",
            "y = sum_k w_k BN(z_k), and skips as in mixed_sum; dw and every dz_k in two passes",
            max_terms=128,
        ),
        OpInfo(
            "mixed_edges",
            "the nodes of a DARTS cell straight from its states, batch norm folded in",
            max_terms=1,
            absent={"triton": "its cells run candidate by candidate and by mixed_norm_sum"},
        ),
        OpInfo(
            "relu_conv_bn",
            "BN(W relu(x)) with 1x1 kernels: the preprocessing of a DARTS cell",
            max_terms=1,
        ),
        OpInfo(
            "sample_paths",
            "paths through a cell: operations and edges by Gumbel noise, straight-through",
            max_terms=128,
        ),
    )
}

KERNELS: dict[tuple[str, str], Kernel[Any]] = {}
"""(op, backend) to what computes it."""

# These are the dtypes of each kind of op: on a GPU there is no float64, and logits have none of 16
# bits. The CPU's cells are compiled for one dtype of 16 bits alone: each takes a minute to build.
ON_GPU = (torch.float32, torch.bfloat16, torch.float16)
ALL = (*ON_GPU, torch.float64)
CELLS_ON_CPU = (torch.float32, torch.bfloat16, torch.float64)
LOGITS = (torch.float32, torch.float64)


def register(op: str, backend: str, kernel: Kernel[Any], dtypes: tuple[torch.dtype, ...]) -> None:
    """Enters a kernel into the table."""
    # The dict in the frozen row is what changes: backends are modules that are imported after this
    # one, and a row knows a backend only once its kernel is there.
    KERNELS[op, backend] = kernel
    OPS[op].dtypes[backend] = dtypes


class Request(NamedTuple):
    """Asks for one op on tensors of one kind of device ("cpu", "cuda") and dtype."""

    op: OpInfo
    device: str
    dtype: torch.dtype
    terms: int = 1

    def refusal(self, backend: str, device: str) -> str | None:
        """Returns why `backend`, which computes on `device`, cannot serve this, or None."""
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
