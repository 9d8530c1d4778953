"""Knows the functions that `accelerate` puts in the place of methods of modules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from fastnas.nn.facts import has_own_forward

F = TypeVar("F", bound=Callable[..., Any])
_REPLACEMENTS: set[Callable[..., Any]] = set()


def replacement(function: F) -> F:
    """Marks a function as one that `accelerate` sets on modules, in a `functools.partial`."""
    _REPLACEMENTS.add(function)
    return function


def is_replaced(module: nn.Module, method: str = "forward") -> bool:
    """Tells whether a method of this very module is one of ours."""
    own = vars(module).get(method)
    return isinstance(own, functools.partial) and own.func in _REPLACEMENTS


def has_foreign_forward(module: nn.Module) -> bool:
    """Tells whether somebody else set a forward, or what it calls, on the very module."""
    return has_own_forward(module) and not is_replaced(module)
