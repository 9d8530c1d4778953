"""What says how good a cell is: a table, a trained supernet, or a short training."""

from fastnas.search.evaluators.base import Evaluation, EvaluationError, Evaluator
from fastnas.search.evaluators.supernet import SupernetEvaluator
from fastnas.search.evaluators.table import TableEvaluator, read_table

__all__ = [
    "Evaluation",
    "EvaluationError",
    "Evaluator",
    "SupernetEvaluator",
    "TableEvaluator",
    "read_table",
]
