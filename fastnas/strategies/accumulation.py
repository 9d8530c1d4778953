"""Adds up the gradient of the training loss for the weights over the passes of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnas.strategies.steps import WeightStep


def accumulate(
    step: WeightStep, passes: int = 1, scale: float = 1.0, clip_each: bool = False
) -> tuple[Tensor, Tensor]:
    """Fills grad = clip(scale sum_k grad L_k), or with `clip_each` scale sum_k clip(grad L_k).

    A parameter that no pass uses keeps grad None, so that momentum and weight decay leave it alone.

    The loss is scaled where the precision of the step says so, and its gradient unscaled before it
    is clipped.

    Returns:
        The mean loss, and the logits, of several passes with a leading axis.
    """
    losses, logits = [], []
    sums: dict[Tensor, Tensor] = {}
    for _ in range(passes):
        loss, out = step.forward()
        # Clipping each pass comes before the scale, so there the scale waits for `_move`. With
        # scale 1 the graph is that of a plain backward, node for node.
        step.precision.backward(loss if scale == 1 or clip_each else scale * loss)
        losses.append(loss.detach())
        logits.append(out.detach())
        if clip_each:
            # The gradient of this pass leaves `grad` before the next one comes: clipping must see
            # the norm of one pass, not that of their sum.
            step.precision.finish(step.params, step.grad_clip)
            _move(step.params, sums, scale)
    if clip_each:
        for p, total in sums.items():
            # A parameter that no pass has used is not among the sums, and keeps None.
            p.grad = total
    else:
        step.precision.finish(step.params, step.grad_clip)
    if passes == 1:
        return losses[0], logits[0]
    return torch.stack(losses).mean(), torch.stack(logits)


def _move(params: Sequence[Tensor], sums: dict[Tensor, Tensor], scale: float) -> None:
    """Adds scale grad to `sums` and clears it."""
    for p in params:
        if p.grad is not None:
            # This adds in place from the second pass on, so K passes hold one gradient and not K.
            sums[p] = scale * p.grad if p not in sums else sums[p].add_(p.grad, alpha=scale)
            p.grad = None
