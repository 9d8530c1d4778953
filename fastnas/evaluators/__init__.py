"""Says how good a cell is: by a table, by a supernet's weights, or by a training."""

from fastnas.evaluators.base import Evaluation, EvaluationError, Evaluator
from fastnas.evaluators.table import TableEvaluator, read_table

__all__ = [
    "Evaluation",
    "EvaluationError",
    "Evaluator",
    "TableEvaluator",
    "read_table",
]
