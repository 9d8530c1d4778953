"""Looks cells up: what the evaluators that read a table have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastnas.checks import check_choice, short, typed
from fastnas.evaluators.base import Evaluation, EvaluationError
from fastnas.spaces import AnyGenotype, layout_of
from fastnas.spaces.slots import SlotLayout

Rows = Mapping[str, Mapping[str, float]]
"""A cell's line of text to what is known of it, by name."""


class Lookup:
    """Looks accuracies up.

    Args:
        layout: of the cells.
        table: each cell's text (`Layout.line`) to its accuracies by column, 0 to 1.
        column: what a search sees.
        others: columns that `reported` gives.
        what: what the table is one of, for messages.
        settings: as `Evaluator.settings`.
        epochs: of training that a look stands for, 0 where it is not known.
        costs: column to each cell's text to what the cell costs on that data set, by name.
    """

    def __init__(
        self,
        layout: SlotLayout,
        table: Rows,
        column: str,
        others: Sequence[str],
        *,
        what: str,
        settings: Mapping[str, Any],
        epochs: float = 0.0,
        costs: Mapping[str, Rows] | None = None,
    ) -> None:
        self.layout, self.column, self.others = layout, column, tuple(others)
        self.settings = dict(settings)
        self._table, self._costs, self._what, self._epochs = table, costs or {}, what, epochs

    @typed
    def entry(self, cell: AnyGenotype) -> dict[str, float]:
        """Returns column to accuracy, 0 to 1; EvaluationError where the table has no such cell."""
        line = layout_of(cell).line(cell)
        if line not in self._table:
            raise EvaluationError(f"a table of {self._what} knows no cell {short(line)}")
        return dict(self._table[line])

    def score(self, cell: AnyGenotype, column: str) -> dict[str, float]:
        """Returns a cell's accuracy in a column, the best that is there, its regret and its rank.

        Regret is the best accuracy less the cell's, ranks begin with 1. Where the table knows what
        the cell costs, that stands beside: `parameters`, `latency_seconds`, `training_seconds`.
        """
        entry = self.entry(cell)
        check_choice("column", column, entry)
        accuracy, best = entry[column], self.best(column)
        # Cells of equal accuracy share the better rank.
        rank = 1 + sum(row[column] > accuracy for row in self._table.values())
        costs = self._costs.get(column, {}).get(layout_of(cell).line(cell), {})
        return {
            "accuracy": accuracy,
            "best": best,
            "regret": best - accuracy,
            "rank": rank,
            **costs,
        }

    def best(self, column: str) -> float:
        """Returns the largest accuracy of a column; ValueError for one that was not read."""
        check_choice("column", column, (self.column, *self.others))
        return max(row[column] for row in self._table.values())

    def evaluate(self, cells: Sequence[AnyGenotype], seeds: Sequence[int]) -> list[Evaluation]:
        """Returns the entries; a table knows no seeds."""
        return [Evaluation(self.entry(cell)[self.column], epochs=self._epochs) for cell in cells]

    def reported(self, cell: AnyGenotype) -> dict[str, dict[str, float]]:
        """Scores a cell in the other columns."""
        return {column: self.score(cell, column) for column in self.others}
