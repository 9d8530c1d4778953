"""Keeps running statistics as torch's batch norm does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Running = tuple[Tensor, Tensor]
"""running_mean and running_var of a batch norm, each [C]."""


def update_running(
    running: Sequence[Running | None],
    stats: Tensor,
    samples: int,
    momentum: float,
    moved: Tensor | None = None,
) -> None:
    """running = (1 - momentum) running + momentum (mean, unbiased variance), in place.

    Args:
        running: of each norm; None where it keeps none.
        stats: [norms, 2, C] mean and biased variance of the batch.
        samples: values per channel that they are of.
        momentum: as in `torch.nn.BatchNorm2d`.
        moved: bool [norms], read on the device; the others stand still. By default all.
    """
    kept = [(r, s) for r, s in zip(running, stats.unbind()) if r is not None]
    if not kept:
        return
    with torch.no_grad():
        means, variances = [r[0] for r, _ in kept], [r[1] for r, _ in kept]
        dtype = means[0].dtype
        now = torch.stack([s for _, s in kept]) if len(kept) < len(running) else stats
        now = torch.stack([now[:, 0], now[:, 1] * (samples / (samples - 1))], dim=1).to(dtype)
        pairs = now.unbind()
        if moved is not None:
            before = torch.stack([t for r, _ in kept for t in r]).unflatten(0, (-1, 2))
            after = torch.where(moved[:, None, None], before.lerp(now, momentum), before)
            torch._foreach_copy_(means, after[:, 0].unbind())
            torch._foreach_copy_(variances, after[:, 1].unbind())
            return
        for have, new in ((means, 0), (variances, 1)):
            torch._foreach_mul_(have, 1 - momentum)
            torch._foreach_add_(have, [pair[new] for pair in pairs], alpha=momentum)


def stack_running(running: Sequence[Running], dtype: torch.dtype) -> Tensor:
    """[norms, 2, C] of the running statistics, as kernels read them."""
    return torch.stack([t for pair in running for t in pair]).to(dtype).unflatten(0, (-1, 2))
