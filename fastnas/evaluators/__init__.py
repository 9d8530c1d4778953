"""What says how good a cell is: a table, and in modules of their own a supernet and a training."""

from fastnas.evaluators.base import Evaluation, EvaluationError, Evaluator
from fastnas.evaluators.table import TableEvaluator, read_table

__all__ = [
    "Evaluation",
    "EvaluationError",
    "Evaluator",
    "TableEvaluator",
    "read_table",
]
