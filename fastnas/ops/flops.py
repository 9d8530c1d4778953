"""Makes `torch.utils.flop_counter.FlopCounterMode` count for an op what it counts for eager.

A fused op is one operator to the counter. Its formula runs the body of the op on the eager backend
with tensors that have shapes and no values, and takes what the counter finds there: the numbers are
those of the mathematics, whatever a kernel computes again or saves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_map_only

Body = Callable[..., Any]
_formulas: dict[Any, Callable[..., int]] = {}


def count_as_eager(op: str, fwd: Body, bwd: Body) -> None:
    """Makes the formulas of an op, whose bodies take the backend as their last argument."""

    def forward(*given: Any, out_val: Any = None) -> int:
        return sum(_counted(fwd, given).values())

    def backward(*given: Any, out_val: Any = None) -> int:
        # The eager backend computes forward again, which eager itself does not.
        counts = _counted(bwd, given)
        return sum(counts.values()) - counts.get(torch.ops.aten.convolution, 0)

    _formulas[getattr(torch.ops.fastnas, f"{op}_fwd")] = forward
    _formulas[getattr(torch.ops.fastnas, f"{op}_bwd")] = backward


def serve_counters() -> None:
    """Gives our formulas to the counters that are active.

    They cannot be registered as fastnas is imported: torch's module of counters imports Triton,
    which takes 0.4 s and reads TRITON_INTERPRET as it does.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    # Each counter has a registry of its own, copied from torch's as it was made, so every active
    # one is told, at each call.
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, module._FlopCounterMode):
            mode.counter.flop_registry.update(_formulas)


def _counted(body: Body, given: tuple[Any, ...]) -> dict[Any, int]:
    from torch.utils.flop_counter import FlopCounterMode

    # On the meta device nothing is computed; the last argument is the backend, which becomes eager.
    shapes = tree_map_only(Tensor, lambda t: t.to("meta"), given[:-1])
    with FlopCounterMode(display=False) as counter:
        body(*shapes, "eager")
    return counter.get_flop_counts().get("Global", {})
