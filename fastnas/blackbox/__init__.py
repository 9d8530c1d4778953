"""Searches without gradients: methods that propose cells, and the studies that evaluate them.

A new method is a class in a file here and an entry in BLACK_BOX.
"""

from typing import Any

from fastnas.blackbox.bayesian import AnasodBayesian, Bayesian
from fastnas.blackbox.methods import (
    AnasodLocal,
    AnasodRandom,
    BlackBox,
    Evolution,
    Local,
    Random,
)
from fastnas.blackbox.reinforce import AnasodReinforce, Reinforce
from fastnas.checks import check_choice

BLACK_BOX: dict[str, type[BlackBox]] = {
    method.name: method
    for method in (
        *(AnasodRandom, AnasodLocal, AnasodBayesian, AnasodReinforce),
        *(Random, Local, Bayesian, Reinforce, Evolution),
    )
}


def get_black_box(name: str, **options: Any) -> BlackBox:
    """Returns the method of that name; ValueError names the methods, or the options, there are."""
    check_choice("method", name, BLACK_BOX)
    return BLACK_BOX[name](**options)


__all__ = ["BLACK_BOX", "BlackBox", "get_black_box"]
