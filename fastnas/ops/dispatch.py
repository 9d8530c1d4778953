"""Which backend an op runs on, and when its body can be called without torch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import function
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastnas.backends import BackendError, choose
from fastnas.ops.flops import serve_counters
from fastnas.ops.table import OPS


def choose_backend(op: str, like: Tensor, backend: str | None, terms: int = 1) -> str:
    """The name of the backend that runs `op` on so many tensors like this one."""
    return choose(OPS[op], like.device, like.dtype, terms, backend)


def has_kernel(op: str, like: Tensor, terms: int) -> bool:
    """Whether a call with so many terms like this one runs on a kernel, not eagerly.

    Supposed while torch.compile traces, which cannot follow the choice; the call makes it then.
    """
    if torch.compiler.is_compiling():
        return True
    try:
        return choose_backend(op, like, None, terms) != "eager"
    except BackendError:
        return False


def is_plain_call() -> bool:
    """Whether nothing watches the dispatcher, so that the op's body can be called without it.

    That is half of the call's overhead: 0.1 of 0.2 ms forward, as much backward.
    """
    if torch.compiler.is_compiling():
        return False
    if is_in_torch_dispatch_mode():
        serve_counters()
        return False
    return True


def own_output(t: Tensor) -> Tensor:
    """`t`, copied where it is empty: backends share that one, and torch gives outputs a history."""
    return t if t.numel() else t.clone()


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator, entered only where backward makes a graph of itself.

    Elsewhere gradients are off already, and its `no_grad` costs up to 0.07 ms in caches that a
    kernel has just flushed.
    """
    guarded = function.once_differentiable(backward)

    @wraps(backward)
    def either(ctx: Any, *grads: Tensor) -> Any:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *grads)

    return either
