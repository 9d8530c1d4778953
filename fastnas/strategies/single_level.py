"""Takes the gradients of logits and weights from one pass over a training batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastnas.strategies.steps import ArchStep, cross_entropy


class Both(NamedTuple):
    """Holds what one pass gives both halves of a step.

    Attributes:
        alphas, params: gradients, in the order of the step; None: the pass has not used it.
        loss: of the training batch with the regulariser, [].
        plain_loss: the same without it.
        logits: [N, classes].
    """

    alphas: list[Tensor]
    params: list[Tensor | None]
    loss: Tensor
    plain_loss: Tensor
    logits: Tensor


def both_gradients(step: ArchStep) -> Both:
    """Returns the gradients of L_train(w, alpha) + regulariser(alpha) for alpha and for w."""
    weights = step.strategy.forward_weights(step.arch)
    logits = step.network(step.train.images, weights, step.train.draw)
    plain = cross_entropy(logits, step.train.labels)
    loss = plain + step.strategy.regulariser(step.arch)
    found = torch.autograd.grad(loss, [*step.alphas, *step.params], allow_unused=True)
    count = len(step.alphas)
    # The logits of a cell type that the network lacks have the regulariser alone, or nothing.
    alphas = [torch.zeros_like(a) if g is None else g for a, g in zip(step.alphas, found[:count])]
    return Both(alphas, list(found[count:]), loss.detach(), plain.detach(), logits.detach())
