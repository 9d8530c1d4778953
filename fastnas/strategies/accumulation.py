"""The gradient of the training loss for the weights, added up over the passes of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_


@dataclass(frozen=True)
class ParamsProblem:
    """The weight step: what it has to fill is `grad` of the params, empty when it starts.

    Attributes:
        params: the network's parameters.
        forward: one pass on the training batch: the loss, a mean over the paths of the pass, and
            the logits.
        grad_clip: largest norm of the gradient.
    """

    params: Sequence[Tensor]
    forward: Callable[[], tuple[Tensor, Tensor]]
    grad_clip: float


def accumulate(
    problem: ParamsProblem, passes: int = 1, scale: float = 1.0, clip_each: bool = False
) -> tuple[Tensor, Tensor]:
    """grad = clip(scale sum_k grad L_k), or with `clip_each` scale sum_k clip(grad L_k).

    A parameter that no pass uses keeps grad None, so that momentum and weight decay leave it alone.

    Returns:
        The mean loss, and the logits, of several passes with a leading axis.
    """
    losses, logits = [], []
    sums: dict[Tensor, Tensor] = {}
    for _ in range(passes):
        loss, out = problem.forward()
        (loss if scale == 1 or clip_each else scale * loss).backward()
        losses.append(loss.detach())
        logits.append(out.detach())
        if clip_each:
            clip_grad_norm_(problem.params, problem.grad_clip)
            _move(problem.params, sums, scale)
    if clip_each:
        for p, total in sums.items():
            p.grad = total
    else:
        clip_grad_norm_(problem.params, problem.grad_clip)
    if passes == 1:
        return losses[0], logits[0]
    return torch.stack(losses).mean(), torch.stack(logits)


def _move(params: Sequence[Tensor], sums: dict[Tensor, Tensor], scale: float) -> None:
    """Adds scale grad to `sums` and clears it."""
    for p in params:
        if p.grad is not None:
            sums[p] = scale * p.grad if p not in sums else sums[p].add_(p.grad, alpha=scale)
            p.grad = None
