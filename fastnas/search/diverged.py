"""Stops a run whose numbers are no longer finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class DivergedError(RuntimeError):
    """Says in one line which loss, parameter or output of a run is NaN or infinite."""


def first_not_finite(parts: Mapping[str, Any]) -> str | None:
    """Returns the name of the first tensor with a value that is not finite, or None.

    All tensors are judged before anything is read, so a device is waited for once.

    Args:
        parts: name to what has state_dict().
    """
    found = [pair for name, part in parts.items() for pair in _floats(name, part.state_dict())]
    if not found:
        return None
    finite = [tensor.isfinite().all() for _, tensor in found]
    # Flags of several devices cannot be stacked, and Adam may keep its step counts on the CPU.
    by_device: dict[torch.device, list[Tensor]] = {}
    for flag in finite:
        by_device.setdefault(flag.device, []).append(flag)
    if all(bool(torch.stack(flags).all()) for flags in by_device.values()):
        return None
    return next(name for (name, _), flag in zip(found, finite) if not flag)


def _floats(name: str, state: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields the floating-point tensors of a state dict, with the path that leads to each."""
    if isinstance(state, Tensor):
        if state.is_floating_point():
            yield name, state.detach()
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from _floats(f"{name}.{key}", value)
    elif isinstance(state, list | tuple):
        for key, value in enumerate(state):
            yield from _floats(f"{name}.{key}", value)
