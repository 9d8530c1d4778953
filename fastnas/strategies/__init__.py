"""Search methods, one file each. A new one is a file here and a line in STRATEGIES or BLACK_BOX."""

from collections.abc import Mapping
from typing import Any, TypeVar

from fastnas.checks import check_choice
from fastnas.strategies.anasod import AnasodDARTS, AnasodGDAS
from fastnas.strategies.base import Strategy
from fastnas.strategies.bayesian import AnasodBayesian, Bayesian
from fastnas.strategies.black_box import (
    AnasodLocal,
    AnasodRandom,
    BlackBox,
    Evolution,
    Local,
    Random,
)
from fastnas.strategies.darts import DARTS
from fastnas.strategies.fair_darts import FairDARTS
from fastnas.strategies.gdas import GDAS
from fastnas.strategies.noisy_darts import NoisyDARTS
from fastnas.strategies.reinforce import AnasodReinforce, Reinforce
from fastnas.strategies.rome import ROME, ROMEv1
from fastnas.strategies.single_path import SinglePathDARTS

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy
    for strategy in (
        *(DARTS, NoisyDARTS, FairDARTS, ROME, ROMEv1, GDAS, SinglePathDARTS),
        *(AnasodDARTS, AnasodGDAS),
    )
}


BLACK_BOX: dict[str, type[BlackBox]] = {
    method.name: method
    for method in (
        *(AnasodRandom, AnasodLocal, AnasodBayesian, AnasodReinforce),
        *(Random, Local, Bayesian, Reinforce, Evolution),
    )
}

Kind = TypeVar("Kind", Strategy, BlackBox)


def get_strategy(name: str, **options: Any) -> Strategy:
    """The method of that name; ValueError names the methods, or the options, that there are."""
    return _get(STRATEGIES, name, options)


def get_black_box(name: str, **options: Any) -> BlackBox:
    """`get_strategy` of the methods that need no gradient."""
    return _get(BLACK_BOX, name, options)


def _get(table: Mapping[str, type[Kind]], name: str, options: Mapping[str, Any]) -> Kind:
    check_choice("method", name, table)
    return table[name](**options)


__all__ = [
    "BLACK_BOX",
    "DARTS",
    "GDAS",
    "ROME",
    "STRATEGIES",
    "BlackBox",
    "FairDARTS",
    "NoisyDARTS",
    "ROMEv1",
    "SinglePathDARTS",
    "Strategy",
    "get_black_box",
    "get_strategy",
]
