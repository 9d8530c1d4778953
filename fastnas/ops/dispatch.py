"""Which backend an op runs on, and when its body can be called without torch's dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastnas.backends import BackendError, Request, choose
from fastnas.ops.table import OPS


def choose_backend(op: str, like: Tensor, backend: str | None = None) -> str:
    """The name of the backend that runs `op` on tensors like this one."""
    return choose(Request(OPS[op], like.device.type, like.dtype), backend)


def has_kernel(op: str, like: Tensor, terms: int) -> bool:
    """Whether a call with so many terms like this one runs on a kernel, not eagerly.

    Supposed while torch.compile traces, which cannot follow the choice; the call makes it then.
    """
    if torch.compiler.is_compiling():
        return True
    try:
        return choose(Request(OPS[op], like.device.type, like.dtype, terms)) != "eager"
    except BackendError:
        return False


def is_plain_call() -> bool:
    """Whether nothing watches the dispatcher, so that the op's body can be called without it.

    That is half of the call's overhead: 0.1 of 0.2 ms forward, as much backward.
    """
    return not (torch.compiler.is_compiling() or is_in_torch_dispatch_mode())
