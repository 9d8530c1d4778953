"""One step of the bilevel search: logits on a validation batch, weights on a training batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from fastnas.nn import ArchParameters, NoiseDraw, SearchNetwork
from fastnas.search.optimizers import step_where
from fastnas.strategies import Strategy
from fastnas.strategies.accumulation import ParamsProblem
from fastnas.strategies.hypergradient import Problem
from fastnas.transfer import to_device

Batch = tuple[Tensor, Tensor]
"""Images [N, C, H, W] and labels [N]."""


class Inputs(NamedTuple):
    """What a forward pass reads besides parameters and logits.

    Attributes:
        images, labels: a `Batch`.
        draw: of `SearchNetwork.draw`.
        sample: of `Strategy.draw`.
    """

    images: Tensor
    labels: Tensor
    draw: NoiseDraw | None
    sample: Tensor | None = None


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
        return self.move_alphas(self._drawn(valid), self._drawn(train))

    def weight_step(self, train: Batch) -> tuple[Tensor, Tensor]:
        """Moves the weights by their gradient of the loss on `train`; returns loss and logits,
        [N, classes] or, of several passes or paths, with axes before these."""
        return self.move_params(self._drawn(train))

    def move_alphas(self, valid: Inputs, train: Inputs) -> Tensor:
        """`arch_step` on inputs that are on the device; draws nothing on the host."""
        self.strategy.begin(valid.sample)
        gradient, loss = self.strategy.arch_gradient(self._problem(valid, train))
        for alpha, g in zip(self.alphas, gradient):
            alpha.grad = g
        self.arch_optimizer.step()
        return loss

    def move_params(self, train: Inputs) -> tuple[Tensor, Tensor]:
        """`weight_step` on inputs that are on the device; draws nothing on the host."""

        passes = []

        def forward() -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                weights = self.strategy.forward_weights(self.arch)
            passes.append(weights)
            logits = self.network(train.images, weights, train.draw)
            return _loss(logits, train.labels), logits

        self.strategy.begin(train.sample)
        self.params_optimizer.zero_grad(set_to_none=True)
        problem = ParamsProblem(self.params, forward, self.grad_clip)
        loss, logits = self.strategy.params_gradient(problem)
        step_where(self.params_optimizer, self.network.on_device(passes))
        return loss, logits.detach()

    def _drawn(self, batch: Batch) -> Inputs:
        images, labels = batch
        sample = self.strategy.draw()
        if sample is not None:
            sample = to_device(sample, images.device)
        return Inputs(images, labels, self.network.draw(images.device), sample)

    def _problem(self, valid: Inputs, train: Inputs) -> Problem:
        def loss_on(inputs: Inputs) -> Tensor:
            weights = self.strategy.forward_weights(self.arch)
            return _loss(self.network(inputs.images, weights, inputs.draw), inputs.labels)

        group = self.params_optimizer.param_groups[0]
        return Problem(
            params=self.params,
            alphas=self.alphas,
            train_loss=lambda: loss_on(train),
            valid_loss=lambda: loss_on(valid) + self.strategy.regulariser(self.arch),
            buffers=list(self.network.buffers()),
            lr=group["lr"],
            momentum=group.get("momentum", 0.0),
            weight_decay=group["weight_decay"],
            momentum_buffers=[
                self.params_optimizer.state[p].get("momentum_buffer") for p in self.params
            ],
        )


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits [N, classes], of [paths, N, classes] its mean over the paths."""
    if logits.dim() == 2:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)))
