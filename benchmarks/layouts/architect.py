"""Moves logits by DARTS' second-order gradient as quark0/darts does: through a network `new`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
"""Images and labels."""
RATE, WEIGHT_DECAY = 0.025, 3e-4
STEP_LENGTH = 0.01


def unrolled_gradients(
    network: Any, loss: Callable[[nn.Module, Tensor, Tensor], Tensor], train: Batch, valid: Batch
) -> list[Tensor]:
    """Returns grad_alpha L_val(w - xi grad_w L_train(w, alpha), alpha), by finite differences.

    Four passes: one for w', one of a new network that stands there, and one on either side of w.

    Args:
        network: has `new`, a network like it with the same logits, and `arch_parameters`.
        loss: of a network, images and labels.
    """
    params, alphas = list(network.parameters()), network.arch_parameters()
    ahead = torch.autograd.grad(loss(network, *train), params)
    moved = network.new()
    moved.load_state_dict(network.state_dict())
    with torch.no_grad():
        for there, p, g in zip(moved.parameters(), params, ahead):
            there.sub_(RATE * (g + WEIGHT_DECAY * p))
    there, moved_alphas = list(moved.parameters()), moved.arch_parameters()
    both = torch.autograd.grad(loss(moved, *valid), [*moved_alphas, *there])
    direct, v = both[: len(alphas)], both[len(alphas) :]
    eps = STEP_LENGTH / torch.linalg.vector_norm(torch.cat([g.flatten() for g in v]))
    sides = []
    for step in (eps, -2 * eps):
        _move(params, v, step)
        sides.append(torch.autograd.grad(loss(network, *train), alphas))
    _move(params, v, eps)
    plus, minus = sides
    return [g - RATE * (p - m) / (2 * eps) for g, p, m in zip(direct, plus, minus)]


@torch.no_grad()
def _move(params: Sequence[Tensor], directions: Sequence[Tensor], step: Tensor) -> None:
    for p, direction in zip(params, directions):
        p.add_(step * direction)
