"""Holds the gradient methods, one file each. A new one is a file here and a line in STRATEGIES."""

from typing import Any

from fastnas.checks import check_choice
from fastnas.strategies.anasod import AnasodDARTS, AnasodGDAS
from fastnas.strategies.base import Strategy
from fastnas.strategies.darts import DARTS
from fastnas.strategies.fair_darts import FairDARTS
from fastnas.strategies.gdas import GDAS
from fastnas.strategies.noisy_darts import NoisyDARTS
from fastnas.strategies.rome import ROME, ROMEv1
from fastnas.strategies.single_path import SinglePathDARTS

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy
    for strategy in (
        *(DARTS, NoisyDARTS, FairDARTS, ROME, ROMEv1, GDAS, SinglePathDARTS),
        *(AnasodDARTS, AnasodGDAS),
    )
}


def get_strategy(name: str, **options: Any) -> Strategy:
    """Returns the method of that name; ValueError names the methods, or the options, there are."""
    check_choice("method", name, STRATEGIES)
    return STRATEGIES[name](**options)


__all__ = [
    "DARTS",
    "GDAS",
    "ROME",
    "STRATEGIES",
    "FairDARTS",
    "NoisyDARTS",
    "ROMEv1",
    "SinglePathDARTS",
    "Strategy",
    "get_strategy",
]
