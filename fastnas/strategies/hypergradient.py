"""The gradient of the validation loss with respect to the logits, first order and unrolled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Problem:
    """A bilevel problem at one step: losses as functions of tensors that are changed in place.

    Attributes:
        params: the network's parameters, w of the equations.
        alphas: the logits.
        train_loss, valid_loss: L_train(w, alpha) on this step's training batch and
            L_val(w, alpha) on its validation batch. Repeated calls must see the same noise, or the
            finite difference measures the noise.
        buffers: what the losses change on the way (running statistics), put back afterwards.
        lr, momentum, weight_decay: of the SGD that the unrolled step imitates; lr may be a 0-dim
            tensor.
        momentum_buffers: of that SGD, None where it has none yet.
    """

    params: Sequence[Tensor]
    alphas: Sequence[Tensor]
    train_loss: Loss
    valid_loss: Loss
    buffers: Sequence[Tensor] = ()
    lr: float | Tensor = 0.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    momentum_buffers: Sequence[Tensor | None] = ()


@contextmanager
def frozen(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Inside, no gradient is computed for `tensors`, and nothing is saved for one."""
    before = [t.requires_grad for t in tensors]
    for t in tensors:
        t.requires_grad_(False)
    try:
        yield
    finally:
        for t, required in zip(tensors, before):
            t.requires_grad_(required)


def first_order(problem: Problem) -> tuple[list[Tensor], Tensor]:
    """grad_alpha L_val(w, alpha) and L_val (DARTS eq. 7 with xi = 0); forms no weight gradient."""
    with frozen(problem.params):
        loss = problem.valid_loss()
        return _grad(loss, problem.alphas), loss.detach()


def unrolled(problem: Problem) -> tuple[list[Tensor], Tensor]:
    """The second-order gradient of DARTS (eq. 7 and 8) by its finite difference, and L_val(w', alpha).

        w' = w - xi (m buf + grad_w L_train(w, alpha) + wd w),  xi = lr
        g  = grad_alpha L_val(w', alpha) - xi (grad_alpha L_train(w+, alpha) - grad_alpha L_train(w-, alpha)) / (2 eps)
        w+- = w +- eps v,  v = grad_{w'} L_val(w', alpha),  eps = 0.01 / ||v||_2

    The parameters and buffers are put back bit for bit, from copies, also when a loss raises.
    """  # noqa: E501
    params, alphas, xi = problem.params, problem.alphas, problem.lr
    saved = [p.detach().clone() for p in params]
    saved_buffers = [b.detach().clone() for b in problem.buffers]
    momentum_buffers = problem.momentum_buffers or [None] * len(params)

    def move_to(values: Iterator[Tensor]) -> None:
        with torch.no_grad():
            for p, value in zip(params, values):
                p.copy_(value)

    try:
        with frozen(alphas):
            steps = _grad(problem.train_loss(), params)
        for step, p, buffer in zip(steps, saved, momentum_buffers):
            step.add_(p, alpha=problem.weight_decay)
            if buffer is not None:
                step.add_(buffer, alpha=problem.momentum)
        move_to(p - xi * step for p, step in zip(saved, steps))
        loss = problem.valid_loss()
        both = _grad(loss, [*alphas, *params])
        gradient, v = both[: len(alphas)], both[len(alphas) :]
        eps = 0.01 / torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in v]))
        sides = []
        for sign in (1.0, -1.0):
            move_to(p + sign * eps * g for p, g in zip(saved, v))
            with frozen(params):
                sides.append(_grad(problem.train_loss(), alphas))
        gradient = [g - xi * (plus - minus) / (2 * eps) for g, plus, minus in zip(gradient, *sides)]
        return gradient, loss.detach()
    finally:
        with torch.no_grad():
            for tensor, value in zip([*params, *problem.buffers], [*saved, *saved_buffers]):
                tensor.copy_(value)


def _grad(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients, zero for an input without effect (logits of a cell type that is not there)."""
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs)]
