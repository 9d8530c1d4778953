"""Defines the losses of a step of a `ChoiceSearch`, as its gradients differentiate them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from fastnas.strategies.precision import HalfStep

Loss = Callable[[nn.Module, Any], Tensor]
"""Maps a network and a batch to a loss []."""


def cross_entropy(network: nn.Module, batch: Any) -> Tensor:
    """Returns the loss of batches (inputs, class labels [N]): the usual one."""
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise TypeError(
            f"a batch is a {type(batch).__name__}; by default pairs (inputs, labels) are needed."
            " What is made of others is said by loss=, a function of (network, batch)"
        )
    inputs, labels = batch
    loss: Tensor = F.cross_entropy(network(inputs), labels)
    return loss


def endless(batches: Iterable[Any], name: str) -> Iterator[Any]:
    """Yields the batches again and again; ValueError where there are none."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError(f"{name} has no batches; at least one is needed")


@dataclass(frozen=True)
class ArchHalf:
    """Holds the half that moves the logits: its losses, functions of tensors that change in place.

    Attributes:
        regulariser: is added to the loss on `valid`.
        params, alphas: weights and logits.
        valid, train: batches, on the network's device.
        optimizer: the SGD of the weights, which the unrolled step imitates.
        precision: what the losses are computed and differentiated in.
    """

    network: nn.Module
    loss: Loss
    regulariser: Callable[[], Tensor | float]
    params: Sequence[Tensor]
    alphas: Sequence[Tensor]
    valid: Any
    train: Any
    optimizer: Optimizer
    precision: HalfStep = field(default_factory=HalfStep)
    _random: list[list[tuple[torch.Generator, Tensor]]] = field(default_factory=list)

    def valid_loss(self) -> Tensor:
        """Returns L_valid(w, alpha) with the regulariser."""
        with self.precision.autocast():
            loss = self.loss(self.network, self.valid)
        return loss + self.regulariser()

    def train_loss(self, exact: bool = False) -> Tensor:
        """Returns L_train(w, alpha); repeated calls draw the same, noise and dropout included.

        Args:
            exact: whether it is computed in float32, whatever the precision.
        """
        with self._replayed(), nullcontext() if exact else self.precision.autocast():
            return self.loss(self.network, self.train)

    def buffers(self) -> list[Tensor]:
        """Returns what the losses change on the way: running statistics."""
        return list(self.network.buffers())

    @contextmanager
    def _replayed(self) -> Iterator[None]:
        # A finite difference of two losses with noise of their own would measure the noise.
        if not self._random:
            self._random.append([(g, g.get_state()) for g in _generators(self.alphas[0].device)])
            yield
            return
        after = [(g, g.get_state()) for g, _ in self._random[0]]
        try:
            for generator, state in self._random[0]:
                generator.set_state(state)
            yield
        finally:
            for generator, state in after:
                generator.set_state(state)


def _generators(device: torch.device) -> list[torch.Generator]:
    """Returns torch's own generators that a pass on a device may draw from."""
    if device.type != "cuda":
        return [torch.default_generator]
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[index]]
