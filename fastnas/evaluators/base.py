"""Defines what an evaluator offers, and what an evaluation costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from fastnas.options import Optioned
from fastnas.spaces import AnyGenotype
from fastnas.spaces.slots import SlotLayout


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

    @property
    def settings(self) -> dict[str, Any]:
        """Returns what all workers of a study must agree on; a path is another on each machine."""

    def evaluate(self, cells: Sequence[AnyGenotype], seeds: Sequence[int]) -> list[Evaluation]:
        """Evaluates each cell once, several together where that is cheaper.

        Args:
            cells: of the layout.
            seeds: of what is random in an evaluation, one a cell.

        Raises:
            EvaluationError: a cell cannot be evaluated.
        """

    def reported(self, cell: AnyGenotype) -> dict[str, dict[str, float]] | None:
        """Scores the cell that a study found on what the study did not see, None where it cannot.

        Returns:
            Name to accuracy, the best there is ("best"), the "regret", the cell's "rank", and its
            costs where they are known (`Lookup.score`).
        """


class EvaluatorOptions(Optioned):
    """Holds the options of an evaluator, and opens it.

    An evaluator is one file of `fastnas.evaluators` with a subclass: its `name`, what follows it in
    "name:PLACE" (`place`), and its options as fields (`fastnas.options.option`).
    """

    what = "evaluator"
    table: ClassVar[dict[str, type[EvaluatorOptions]]] = {}
    place: ClassVar[str]

    def open(self, place: str) -> Evaluator:
        """Opens the evaluator; raises what is wrong with the place."""
        raise NotImplementedError
