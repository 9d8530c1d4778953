"""Copies small host tensors to the device of a run without waiting for the work queued there.

Through pinned memory, whose allocator keeps a block until the copy has read it; a copy from
ordinary memory waits for every kernel queued before it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def staged(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a CPU tensor where a copy to `device` can be asynchronous."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def to_device(tensor: Tensor, device: torch.device | None) -> Tensor:
    """Copies a CPU tensor to `device`; None leaves it on the CPU."""
    if device is None:
        return tensor
    return staged(tensor, device).to(device, non_blocking=True)
