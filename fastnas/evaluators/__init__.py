"""Says how good a cell is: every module here is imported, and enters its evaluator."""

from importlib import import_module
from pkgutil import iter_modules

from fastnas.evaluators.base import Evaluation, EvaluationError, Evaluator, EvaluatorOptions
from fastnas.evaluators.table import TableEvaluator, read_table

__all__ = [
    "EVALUATORS",
    "Evaluation",
    "EvaluationError",
    "Evaluator",
    "TableEvaluator",
    "read_table",
]

EVALUATORS = EvaluatorOptions.table
"""Evaluator by name."""

for _module in iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)
