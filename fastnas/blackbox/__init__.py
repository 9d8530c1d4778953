"""Searches without gradients: methods that propose cells, and the studies that evaluate them."""

from typing import Any

import fastnas.blackbox.methods  # noqa: F401 - enters them in the table
from fastnas.blackbox.methods.base import BlackBox
from fastnas.options import make

__all__ = ["BLACK_BOX", "BlackBox", "get_black_box"]

BLACK_BOX = BlackBox.table
"""Method by name."""


def get_black_box(name: str, **options: Any) -> BlackBox:
    """Returns the method of that name; ValueError names the methods, or the options, there are."""
    return make(BlackBox, name, options)
