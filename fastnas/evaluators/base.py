"""Defines what an evaluator offers, and what an evaluation costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fastnas.spaces import AnyGenotype
from fastnas.spaces.distribution import SlotLayout


class EvaluationError(RuntimeError):
    """Tells that a cell could not be evaluated, or an evaluator not be built; one line says why."""


@dataclass(frozen=True)
class Evaluation:
    """Says how good a cell is, and what it took to know.

    Attributes:
        accuracy: 0 to 1, on the images that the search may see.
        seconds: of this machine.
        epochs: of training, those a table's makers spent included.
    """

    accuracy: float
    seconds: float = 0.0
    epochs: float = 0.0


class Evaluator(Protocol):
    """Evaluates cells of one layout."""

    @property
    def layout(self) -> SlotLayout:
        """Returns the layout of the cells that it evaluates."""

    def evaluate(self, cells: Sequence[AnyGenotype], seeds: Sequence[int]) -> list[Evaluation]:
        """Returns one evaluation for each cell, several together where that is cheaper.

        Args:
            cells: of the layout.
            seeds: of what is random in an evaluation, one a cell.

        Raises:
            EvaluationError: a cell cannot be evaluated.
        """
