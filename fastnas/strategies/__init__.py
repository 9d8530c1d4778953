"""Holds the gradient methods, one file each: every module here is imported, and enters its own."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from fastnas.options import make
from fastnas.strategies.base import Strategy

__all__ = ["STRATEGIES", "Strategy", "get_strategy"]

STRATEGIES = Strategy.table
"""Method by name."""

for _module in iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)


def get_strategy(name: str, **options: Any) -> Strategy:
    """Returns the method of that name; ValueError names the methods, or the options, there are."""
    return make(Strategy, name, options)
