"""Tells whether `torch.func`, vmap or forward-mode differentiation rewrites what is called."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Tells whether tensors may stand for many, or carry tangents, of which kernels know nothing.

    Not while torch.compile traces: it unwraps the transforms that it serves by itself.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
