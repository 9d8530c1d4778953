"""Lets the fused ops that hold convolutions follow `torch.autocast`, as a convolution does."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from fastnas.ops.dispatch import needs_graph


def autocast_dtype(t: Tensor) -> torch.dtype:
    """Returns the dtype in which an op computes on t: that of autocast where it is on, or t's."""
    # Autocast leaves float64 alone, and knows no other kinds of device that fastnas does.
    kind = t.device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return t.dtype
    casts = t.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return torch.get_autocast_dtype(kind) if casts else t.dtype


def without_autocast(x: object) -> AbstractContextManager[Any]:
    """Returns what an op runs in, so that autocast does not reach what it is made of."""
    # It is entered only where autocast is on, since that takes as long as a small kernel.
    if not isinstance(x, Tensor) or x.device.type not in ("cpu", "cuda"):
        return nullcontext()
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def follow_autocast(
    states: list[Tensor], params: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Casts what an op is called with as autocast casts it for a convolution; w is not among it.

    Without parameters nothing is cast: autocast leaves pools and identities alone.
    """
    # What is no tensor is left to the checks that come after this.
    tensors = all(isinstance(t, Tensor) for t in (*states, *params))
    if not params or not tensors:
        return states, params
    return [t.to(autocast_dtype(t)) for t in states], _cast(params)


def _cast(params: list[Tensor]) -> list[Tensor]:
    dtype = autocast_dtype(params[0])
    if all(p.dtype == dtype for p in params):
        return params
    # One cast for the 170 parameters of a cell; of several dtypes or devices each has its own.
    if len({(p.dtype, p.device) for p in params}) > 1:
        return [p.to(autocast_dtype(p)) for p in params]
    if needs_graph(params):
        cast: tuple[Tensor, ...] = _Cast.apply(dtype, *params)
        return list(cast)
    return _cast_at_once(params, dtype)


def _cast_at_once(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    # These are views of one storage, which lives as long as any of them.
    return list(_unflatten_dense_tensors(_flatten_dense_tensors(tensors).to(dtype), tensors))


class _Cast(torch.autograd.Function):
    """Casts many parameters at once, and their gradients back: autograd keeps one node for all."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *params: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = params[0].dtype
        ctx.set_materialize_grads(False)  # parameters of candidates that did not run have none
        return tuple(_cast_at_once(params, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = [g for g in grads if g is not None]
        wide = iter(_cast_at_once(found, ctx.dtype) if found else ())
        return None, *(None if g is None else next(wide) for g in grads)
