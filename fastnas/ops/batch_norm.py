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
    kept = [i for i, pair in enumerate(running) if pair is not None]
    if not kept:
        return
    # Buffers are updated beside the graph: recorded, the update would hold every batch before it.
    with torch.no_grad():
        pairs = [pair for pair in running if pair is not None]
        # They are stacked, since a list of indices would be copied to the device, and waited for.
        own = stats if len(kept) == len(running) else torch.stack([stats[i] for i in kept])
        # `have` holds 2 norms tensors [C], the means first, and `now` is [2 norms, C] in that
        # order.
        have = [*[mean for mean, _ in pairs], *[var for _, var in pairs]]
        means, variances = own.unbind(1)
        # A batch is normalised by its biased variance; what is kept is the unbiased one.
        unbiased = variances * (samples / (samples - 1))
        now = torch.cat([means, unbiased]).to(have[0].dtype)
        if moved is not None:
            # No branch may hang on `moved`, which only the device knows: all norms are written,
            # those that stand still with what they had. A captured graph does the same for any
            # sample.
            before = torch.stack(have)
            after = torch.where(moved.repeat(2)[:, None], before.lerp(now, momentum), before)
            torch._foreach_copy_(have, after.unbind())
            return
        if _is_like_one(have, now):
            after = torch.stack(have).mul_(1 - momentum).add_(now, alpha=momentum)
            torch._foreach_copy_(have, after.unbind())
            return
        torch._foreach_mul_(have, 1 - momentum)
        torch._foreach_add_(have, now.unbind(), alpha=momentum)


def _is_like_one(have: list[Tensor], now: Tensor) -> bool:
    """Tells whether arithmetic on all at once gives the same bits as on one after the other.

    There a loop over 220 tensors is worth one pass less. Not in bfloat16, whose loop rounds twice;
    elsewhere than on the CPU the loop is one kernel.
    """
    return (
        now.device.type == "cpu"
        and now.dtype in (torch.float32, torch.float64)
        and {now.dtype}.issuperset([t.dtype for t in have])
    )


def stack_running(running: Sequence[Running], dtype: torch.dtype) -> Tensor:
    """Stacks running statistics to [norms, 2, C], as kernels read them."""
    return torch.stack([t for pair in running for t in pair]).to(dtype).unflatten(0, (-1, 2))
