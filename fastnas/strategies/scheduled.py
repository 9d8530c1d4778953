"""Holds what mixtures share that have one number which follows the epochs."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastnas.strategies.base import check_epoch
from fastnas.strategies.mixture import Mixture


class Scheduled(Mixture):
    """Runs a mixture in which one number follows the epochs: a weight, or the radius of a ball."""

    figure: ClassVar[str]
    """What the history calls the number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.level = self.level_of(0, 1)
        self._drawn: Tensor | None = None

    def level_of(self, epoch: int, epochs: int) -> float:
        """Returns the number in an epoch, 0 to epochs - 1."""
        raise NotImplementedError

    def start_epoch(self, epoch: int, epochs: int) -> None:
        check_epoch(epoch, epochs)
        # What a step of the epoch before has begun with must not outlive it.
        self.level, self._drawn = self.level_of(epoch, epochs), None

    def figures(self) -> dict[str, float]:
        return {self.figure: self.level}

    def draw(self) -> Tensor:
        """Returns the bits of the number, int64 [1]; nothing is random."""
        # A CUDA graph reads it from the device at every replay; a Python number would stay that of
        # the epoch in which the graph was captured.
        return torch.tensor([self.level], dtype=torch.float64).view(torch.int64)

    def begin(self, drawn: Tensor | None) -> None:
        self._drawn = drawn

    def current(self, like: Tensor) -> Tensor:
        """Returns the number [], of the dtype and on the device of a tensor."""
        if self._drawn is None:
            return torch.tensor(self.level, dtype=like.dtype, device=like.device)
        return self._drawn[:1].view(torch.float64)[0].to(like.dtype)
