"""Differentiates the validation loss with respect to the logits, first order and unrolled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastnas.strategies.steps import BilevelLosses


@contextmanager
def frozen(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Computes no gradient for `tensors` inside, and saves nothing for one."""
    moving = [t for t in tensors if t.requires_grad]
    for t in moving:
        t.requires_grad_(False)
    try:
        yield
    finally:
        for t in moving:
            t.requires_grad_(True)


def first_order(step: BilevelLosses) -> tuple[list[Tensor], Tensor]:
    """Returns grad_alpha L_val(w, alpha) and L_val (DARTS eq. 7, xi = 0); forms no grad_w."""
    with frozen(step.params):
        loss = step.valid_loss()
        return step.precision.grad(loss, step.alphas), loss.detach()


def unrolled(step: BilevelLosses) -> tuple[list[Tensor], Tensor]:
    """Takes DARTS' second-order gradient (eq. 7 and 8) by a finite difference; and L_val(w', alpha).

        w' = w - xi (m buf + grad_w L_train(w, alpha) + wd w),  xi = lr
        g  = grad_alpha L_val(w', alpha) - xi (grad_alpha L_train(w+, alpha) - grad_alpha L_train(w-, alpha)) / (2 eps)
        w+- = w +- eps v,  v = grad_{w'} L_val(w', alpha),  eps = 0.01 / ||v||_2

    In bf16 and fp16 the two passes at w+- run in float32; of a scaled loss every gradient is unscaled
    at once, so that w' and eps are those of the loss itself. Where one is not finite, g is not.

    Of several processes each computes its own share of g, whose mean is that of all; w' and v are
    those of all. The parameters and buffers are put back bit for bit, from copies, also when a loss
    raises.
    """  # noqa: E501
    params, alphas, buffers = step.params, step.alphas, step.buffers()
    saved = [p.detach().clone() for p in params]
    saved_buffers = [b.detach().clone() for b in buffers]
    settings, state = step.optimizer.param_groups[0], step.optimizer.state
    xi, momentum = settings["lr"], settings.get("momentum", 0.0)

    def move_to(values: Iterator[Tensor]) -> None:
        with torch.no_grad():
            for p, value in zip(params, values):
                p.copy_(value)

    try:
        with frozen(alphas):
            # This is grad_w L_train(w, alpha); the frozen logits get none, and nothing is saved for
            # it.
            ahead = step.precision.grad(step.train_loss(), params)
        ahead = step.precision.processes.means(ahead)
        for g, p, value in zip(ahead, params, saved):
            # w' is where SGD would go, weight decay and momentum included, as in the public code.
            g.add_(value, alpha=settings["weight_decay"])
            velocity = state[p].get("momentum_buffer")
            if velocity is not None:
                g.add_(velocity, alpha=momentum)
        move_to(value - xi * g for value, g in zip(saved, ahead))
        loss = step.valid_loss()
        # One backward pass gives the first term of equation 7 and v, for which the weights stand at
        # w'.
        both = step.precision.grad(loss, [*alphas, *params])
        gradient, v = both[: len(alphas)], step.precision.processes.means(both[len(alphas) :])
        # This is the step length of DARTS' footnote in section 2.3, by the norm over all
        # parameters.
        eps = 0.01 / torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in v]))
        sides = []
        for sign in (1.0, -1.0):
            # It starts from the saved w, not from w': the difference is taken around the weights as
            # they are.
            move_to(p + sign * eps * g for p, g in zip(saved, v))
            with frozen(params):
                # In float32: a step of norm 0.01 over all parameters would vanish in the rounding
                # of 8 or 11 bits.
                sides.append(step.precision.grad(step.train_loss(exact=True), alphas))
        # This is equation 7, with equation 8 in the place of its Hessian-vector product.
        gradient = [g - xi * (plus - minus) / (2 * eps) for g, plus, minus in zip(gradient, *sides)]
        return gradient, loss.detach()
    finally:
        with torch.no_grad():
            # Four forward passes have moved the running statistics too; the step must leave no
            # trace in them.
            for tensor, value in zip([*params, *buffers], [*saved, *saved_buffers]):
                tensor.copy_(value)
