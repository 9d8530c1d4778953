"""One step of the bilevel search: logits on a validation batch, weights on a training batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from fastnas.nn import ArchParameters, SearchNetwork
from fastnas.strategies import Strategy
from fastnas.strategies.hypergradient import Problem

Batch = tuple[Tensor, Tensor]
"""Images [N, C, H, W] and labels [N]."""


class Bilevel:
    """The two halves of a search step, each without the other's gradients.

    The architecture step forms no weight gradient and the weight step no logit gradient, which
    the public code does for nothing (1.4 to 1.6 times the work).

    Args:
        network, arch: what is searched; both on one device.
        strategy: the method.
        params_optimizer: SGD over the network's parameters (its settings are also those of the
            unrolled step).
        arch_optimizer: over the logits.
        grad_clip: largest norm of the weight gradient.
    """

    def __init__(
        self,
        network: SearchNetwork,
        arch: ArchParameters,
        strategy: Strategy,
        params_optimizer: Optimizer,
        arch_optimizer: Optimizer,
        grad_clip: float = 5.0,
    ) -> None:
        self.network = network
        self.arch = arch
        self.strategy = strategy
        self.params_optimizer = params_optimizer
        self.arch_optimizer = arch_optimizer
        self.grad_clip = grad_clip
        self.params = list(network.parameters())
        self.alphas = list(arch.parameters())

    def arch_step(self, valid: Batch, train: Batch) -> Tensor:
        """Moves the logits by their gradient of the loss on `valid`; returns that loss.

        `train` is what the unrolled gradient looks ahead on.
        """
        gradient, loss = self.strategy.arch_gradient(self._problem(valid, train))
        for alpha, g in zip(self.alphas, gradient):
            alpha.grad = g
        self.arch_optimizer.step()
        return loss

    def weight_step(self, train: Batch) -> tuple[Tensor, Tensor]:
        """Moves the weights by their gradient of the loss on `train`; returns loss and logits."""
        images, labels = train
        with torch.no_grad():
            weights = self.strategy.mixing_weights(self.arch)
        self.params_optimizer.zero_grad(set_to_none=True)
        logits = self.network(images, weights)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, self.grad_clip)
        self.params_optimizer.step()
        return loss.detach(), logits.detach()

    def _problem(self, valid: Batch, train: Batch) -> Problem:
        draws = self.network.draw(valid[0].device), self.network.draw(train[0].device)

        def loss_on(batch: Batch, draw: object) -> Tensor:
            weights = self.strategy.mixing_weights(self.arch)
            return F.cross_entropy(self.network(batch[0], weights, draw), batch[1])

        group = self.params_optimizer.param_groups[0]
        return Problem(
            params=self.params,
            alphas=self.alphas,
            train_loss=lambda: loss_on(train, draws[1]),
            valid_loss=lambda: loss_on(valid, draws[0]) + self.strategy.regulariser(self.arch),
            buffers=list(self.network.buffers()),
            lr=float(group["lr"]),
            momentum=group.get("momentum", 0.0),
            weight_decay=group["weight_decay"],
            momentum_buffers=[
                self.params_optimizer.state[p].get("momentum_buffer") for p in self.params
            ],
        )
