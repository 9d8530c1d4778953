"""Decides on the memory layout that the terms of an op share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnas.backends.address import laid_out
from fastnas.backends.transforms import is_transformed

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def common_format(x: Sequence[Tensor]) -> torch.memory_format:
    """Returns channels_last if all tensors lie so and are not also contiguous, else contiguous.

    Under a transform contiguous: torch cannot say how a tensor that stands for many is laid out.
    """
    if all(map(Tensor.is_contiguous, x)) or is_transformed():
        return torch.contiguous_format
    # Mixed layouts end in contiguous copies. Noise is indexed by the NCHW position, so a term draws
    # the same values in either layout, and a copy changes no result.
    layout = _CHANNELS_LAST.get(x[0].dim())
    if layout is not None and all(t.is_contiguous(memory_format=layout) for t in x):
        return layout
    return torch.contiguous_format


def in_common_format(x: Sequence[Tensor]) -> tuple[list[Tensor], torch.memory_format]:
    """Returns the tensors in their common format, copied where they are not, and the format."""
    layout = common_format(x)
    return in_format(x, layout), layout


def in_format(x: Sequence[Tensor], layout: torch.memory_format) -> list[Tensor]:
    """Returns the tensors in this format, copied where they are not."""
    return [
        t if t.is_contiguous(memory_format=layout) and not t.is_neg() else laid_out(t, layout)
        for t in x
    ]


def state_format(x: Tensor) -> torch.memory_format:
    """Returns the format of what the ops of a fused cell make of a state [N, C, H, W] like x.

    Channels last on the CPU, where channels fill the vectors; NCHW on a GPU, where pixels fill the
    warps, and under a transform, as in `common_format`.
    """
    on_cpu = x.device.type == "cpu" and not is_transformed()
    return torch.channels_last if on_cpu else torch.contiguous_format
