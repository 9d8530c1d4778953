"""The specification: eager torch, slow, fp64-safe. Imports only fastnas.spaces."""

from fastnas.reference.mixed_sum import (
    mixed_sum,
    mixed_sum_grads,
    standard_deviations,
    weighted_sum,
)
from fastnas.reference.search_network import Cell, MixedOp, SearchNetwork, Weights, search_step
from fastnas.reference.skip_noise import SkipNoise, cosine_decay, skip_noise

__all__ = [
    "Cell",
    "MixedOp",
    "SearchNetwork",
    "SkipNoise",
    "Weights",
    "cosine_decay",
    "mixed_sum",
    "mixed_sum_grads",
    "search_step",
    "skip_noise",
    "standard_deviations",
    "weighted_sum",
]
