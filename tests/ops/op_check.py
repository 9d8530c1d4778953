"""torch.library.opcheck of both directions of an op, as its call goes through the dispatcher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnas.ops.call import Op

SCHEMA = ("test_schema", "test_autograd_registration")
EVERY = (*SCHEMA, "test_faketensor")


def opcheck(
    op: Op[Any],
    call: Any,
    grad: Tensor,
    needs: Sequence[list[bool]],
    backend: str,
    tests: Sequence[str] = EVERY,
) -> None:
    """Runs `tests`; of backward once for each pattern of gradients that are needed."""
    # Tracing is the same for every backend, and slow.
    tests = [*tests, *(["test_aot_dispatch_dynamic"] if backend == "cpu" else [])]
    fwd, bwd = (getattr(torch.ops.fastnas, f"{op.name}_{way}") for way in ("fwd", "bwd"))
    forward = (*op.flat(call), backend)
    torch.library.opcheck(fwd, forward, test_utils=tests)
    out, saved = fwd(*forward)
    rest, tensors = op.split(call)
    for need in needs:
        reads = op.reads(call, need) or [True] * len(need)
        kept = [t if is_read else None for t, is_read in zip(tensors, reads)]
        again = op.join(rest, [*kept, *tensors[len(need) :]])
        given = [*([out] if op.saves_output else []), *saved]
        torch.library.opcheck(bwd, (grad, *op.flat(again), given, need, backend), test_utils=tests)
