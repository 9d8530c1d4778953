"""Runs eager steps as scripts with `torch.amp` do: autocast, and in fp16 a scaled loss."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer


class Amp:
    """Wraps forward, backward and the step of an optimizer.

    Args:
        dtype: of autocast, float16 with a scaler; None: neither.
        device: of the tensors.
    """

    def __init__(
        self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.dtype, self.device_type = dtype, torch.device(device).type
        self.scaler = GradScaler(self.device_type, enabled=dtype is torch.float16)

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the context of forward and loss."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device_type, self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of the loss, scaled in fp16."""
        self.scaler.scale(loss).backward()

    def step(
        self, optimizer: Optimizer, clipped: Sequence[nn.Parameter] = (), grad_clip: float = 0.0
    ) -> None:
        """Moves by the gradients, those of `clipped` clipped to a norm of `grad_clip` before."""
        if clipped:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(clipped, grad_clip)
        self.scaler.step(optimizer)
        self.scaler.update()
