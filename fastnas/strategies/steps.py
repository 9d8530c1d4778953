"""Defines the two halves of a search step, as a strategy differentiates them.

The loop draws the inputs and moves what is optimised (`fastnas.search.bilevel`); in between lie
only the strategy's gradient and the losses here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from fastnas.nn import ArchParameters, NoiseDraw, SearchNetwork
from fastnas.nn.paths import Weights
from fastnas.strategies.precision import HalfStep

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

    @property
    def precision(self) -> HalfStep:
        """Returns what the losses are computed and differentiated in."""

    def valid_loss(self) -> Tensor:
        """Returns L_val(w, alpha), with what the method adds to it."""

    def train_loss(self, exact: bool = False) -> Tensor:
        """Returns L_train(w, alpha); `exact`: in float32, whatever the precision."""

    def buffers(self) -> list[Tensor]:
        """Returns what the losses change on the way: running statistics."""


@dataclass(frozen=True)
class ArchStep:
    """Holds the half that moves the logits: its losses, functions of tensors that change in place.

    Attributes:
        params: the network's parameters, w of the equations.
        alphas: the logits.
        valid, train: the inputs of L_val(w, alpha) and of L_train(w, alpha). Repeated calls of a
            loss see the same noise, or a finite difference would measure the noise.
        optimizer: the SGD of the params, which the unrolled step imitates.
        precision: what the losses are computed and differentiated in.
        cost: is added to L_val(w, alpha), a function of the logits.
    """

    strategy: Weighing
    network: SearchNetwork
    arch: ArchParameters
    params: Sequence[Tensor]
    alphas: Sequence[Tensor]
    valid: Inputs
    train: Inputs
    optimizer: Optimizer
    precision: HalfStep = field(default_factory=HalfStep)
    cost: Callable[[ArchParameters], Tensor] | None = None

    def valid_loss(self) -> Tensor:
        """Returns L_val(w, alpha) with the strategy's regulariser and the cost."""
        loss = self._loss(self.valid) + self.strategy.regulariser(self.arch)
        return loss if self.cost is None else loss + self.cost(self.arch)

    def train_loss(self, exact: bool = False) -> Tensor:
        """Returns L_train(w, alpha); `exact`: in float32, whatever the precision."""
        return self._loss(self.train, exact)

    def buffers(self) -> list[Tensor]:
        """Returns what the losses change on the way: running statistics."""
        return list(self.network.buffers())

    def _loss(self, inputs: Inputs, exact: bool = False) -> Tensor:
        # What the logits are mapped by stays outside of autocast.
        weights = self.strategy.forward_weights(self.arch)
        with nullcontext() if exact else self.precision.autocast():
            return cross_entropy(self.network(inputs.images, weights, inputs.draw), inputs.labels)


@dataclass(frozen=True)
class WeightStep:
    """Holds the half that moves the weights, which fills `grad` of the params, None at its start.

    Attributes:
        grad_clip: largest norm of the gradient.
        precision: what the loss is computed and differentiated in.
        passes: the weights or paths of the forward passes so far.
    """

    strategy: Weighing
    network: SearchNetwork
    arch: ArchParameters
    params: Sequence[Tensor]
    train: Inputs
    grad_clip: float
    precision: HalfStep = field(default_factory=HalfStep)
    passes: list[Weights] = field(default_factory=list)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Runs the training batch once: the loss, a mean over the paths of the pass, and logits."""
        # The weights are constants of this half. With a graph the network would keep what the
        # gradient of the logits needs, and drop it at the end of the step.
        with torch.no_grad():
            weights = self.strategy.forward_weights(self.arch)
        self.passes.append(weights)
        with self.precision.autocast():
            logits = self.network(self.train.images, weights, self.train.draw)
            return cross_entropy(logits, self.train.labels), logits


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the loss of logits [N, classes]; of [paths, N, classes] its mean over the paths."""
    if logits.dim() == 2:
        return F.cross_entropy(logits, labels)
    # The logits lie path by path, so the labels repeat as a whole, not each one K times in a row.
    return F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)))
