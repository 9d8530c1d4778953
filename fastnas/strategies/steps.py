"""Defines the two halves of a search step, as a strategy differentiates them.

The loop draws the inputs and moves what is optimised (`fastnas.search.bilevel`); in between lie
only the strategy's gradient and the losses here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from fastnas.nn import ArchParameters, NoiseDraw, SearchNetwork
from fastnas.nn.paths import Weights
from fastnas.processes import ALONE, Processes

Batch = tuple[Tensor, Tensor]
"""Images [N, C, H, W] and labels [N]."""


class Inputs(NamedTuple):
    """Holds what a forward pass reads besides parameters and logits.

    Attributes:
        images, labels: a `Batch`.
        draw: of `SearchNetwork.draw`.
        sample: of `Strategy.draw`.
    """

    images: Tensor
    labels: Tensor
    draw: NoiseDraw | None
    sample: Tensor | None = None


class Weighing(Protocol):
    """Answers what the losses ask of a strategy."""

    def forward_weights(self, arch: ArchParameters) -> Weights:
        """Returns what one forward pass runs on."""

    def regulariser(self, arch: ArchParameters) -> Tensor | float:
        """Returns what the loss of the logits has besides."""


class BilevelLosses(Protocol):
    """Answers what the gradient of the logits asks (`hypergradient`): losses and their tensors.

    The tensors change in place. Repeated calls of a loss see the same noise, or a finite difference
    would measure the noise.
    """

    @property
    def params(self) -> Sequence[Tensor]:
        """Returns the network's parameters, w of the equations."""

    @property
    def alphas(self) -> Sequence[Tensor]:
        """Returns the logits."""

    @property
    def optimizer(self) -> Optimizer:
        """Returns the SGD of the params, which the unrolled step imitates."""

    def valid_loss(self) -> Tensor:
        """Returns L_val(w, alpha), with what the method adds to it."""

    def train_loss(self) -> Tensor:
        """Returns L_train(w, alpha)."""

    def buffers(self) -> list[Tensor]:
        """Returns what the losses change on the way: running statistics."""

    @property
    def processes(self) -> Processes:
        """Returns those that share the batches; each computes the losses of its own images."""


@dataclass(frozen=True)
class ArchStep:
    """Holds the half that moves the logits: its losses, functions of tensors that change in place.

    Attributes:
        params: the network's parameters, w of the equations.
        alphas: the logits.
        valid, train: the inputs of L_val(w, alpha) and of L_train(w, alpha). Repeated calls of a
            loss see the same noise, or a finite difference would measure the noise.
        optimizer: the SGD of the params, which the unrolled step imitates.
        processes: share the batches.
    """

    strategy: Weighing
    network: SearchNetwork
    arch: ArchParameters
    params: Sequence[Tensor]
    alphas: Sequence[Tensor]
    valid: Inputs
    train: Inputs
    optimizer: Optimizer
    processes: Processes = ALONE

    def valid_loss(self) -> Tensor:
        """Returns L_val(w, alpha) with the strategy's regulariser."""
        return self._loss(self.valid) + self.strategy.regulariser(self.arch)

    def train_loss(self) -> Tensor:
        """Returns L_train(w, alpha)."""
        return self._loss(self.train)

    def buffers(self) -> list[Tensor]:
        """Returns what the losses change on the way: running statistics."""
        return list(self.network.buffers())

    def _loss(self, inputs: Inputs) -> Tensor:
        weights = self.strategy.forward_weights(self.arch)
        return cross_entropy(self.network(inputs.images, weights, inputs.draw), inputs.labels)


@dataclass(frozen=True)
class WeightStep:
    """Holds the half that moves the weights, which fills `grad` of the params, None at its start.

    Attributes:
        grad_clip: largest norm of the gradient.
        processes: share the batch.
        passes: the weights or paths of the forward passes so far.
    """

    strategy: Weighing
    network: SearchNetwork
    arch: ArchParameters
    params: Sequence[Tensor]
    train: Inputs
    grad_clip: float
    processes: Processes = ALONE
    passes: list[Weights] = field(default_factory=list)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Runs the training batch once: the loss, a mean over the paths of the pass, and logits."""
        # The weights are constants of this half. With a graph the network would keep what the
        # gradient of the logits needs, and drop it at the end of the step.
        with torch.no_grad():
            weights = self.strategy.forward_weights(self.arch)
        self.passes.append(weights)
        logits = self.network(self.train.images, weights, self.train.draw)
        return cross_entropy(logits, self.train.labels), logits

    def clip(self) -> None:
        """Makes `grad` of the params that of all processes, and clips it."""
        self.processes.join_gradients(self.params)
        clip_grad_norm_(self.params, self.grad_clip)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the loss of logits [N, classes]; of [paths, N, classes] its mean over the paths."""
    if logits.dim() == 2:
        return F.cross_entropy(logits, labels)
    # The logits lie path by path, so the labels repeat as a whole, not each one K times in a row.
    return F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)))
