"""Takes the gradients of logits and weights from one pass over a training batch."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastnas.strategies.steps import ArchStep, cross_entropy


class Both(NamedTuple):
    """Holds what one pass gives both halves of a step.

    Attributes:
        alphas, params: gradients, in the order of the step, of this process.
        loss: of the training batch with the regulariser and the cost, [].
        plain_loss: the same without it.
        logits: [N, classes].
    """

    alphas: list[Tensor]
    params: list[Tensor]
    loss: Tensor
    plain_loss: Tensor
    logits: Tensor


def both_gradients(step: ArchStep) -> Both:
    """Returns the gradients of L_train(w, alpha) + regulariser(alpha) for alpha and for w.

    Both are unscaled by the scale of the logits' half, where there is one.
    """
    weights = step.strategy.forward_weights(step.arch)
    with step.precision.autocast():
        logits = step.network(step.train.images, weights, step.train.draw)
        plain = cross_entropy(logits, step.train.labels)
    loss = plain + step.strategy.regulariser(step.arch)
    loss = loss if step.cost is None else loss + step.cost(step.arch)
    found = step.precision.grad(loss, [*step.alphas, *step.params])
    count = len(step.alphas)
    return Both(found[:count], found[count:], loss.detach(), plain.detach(), logits.detach())
