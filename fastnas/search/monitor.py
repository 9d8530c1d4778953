"""Watches a search: skips, entropy, parameter-free operations, collapse to skips."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastnas.checks import check_int, typed
from fastnas.spaces import CELL_TYPES, AnyGenotype, parameter_free_count, skip_count

COLLAPSE_SHARE = 0.5
COLLAPSE_PATIENCE = 3


@typed
def entropy(w: Tensor) -> float:
    """Returns the mean entropy of the edges' weights, as a share of its maximum log K.

    Weights that do not sum to 1 (sigmoids) are normalised first. 1: undecided, 0: decided.
    """
    if w.dim() < 1 or not w.is_floating_point() or w.layout != torch.strided:
        raise ValueError(
            f"w is {w.dtype} of shape {list(w.shape)}, {w.layout}; dense floating point weights"
            " [..., K] are needed"
        )
    p = w.detach().double()
    p = p / p.sum(dim=-1, keepdim=True)
    candidates = p.shape[-1]
    # The maximum log 1 is 0, and the share would be 0 / 0.
    if candidates == 1:
        return 0.0
    # xlogy is 0 at p = 0, where p log p would be NaN.
    return float(-torch.xlogy(p, p).sum(-1).mean() / math.log(candidates))


@typed
def observe(weights: Mapping[str, Tensor], genotype: AnyGenotype) -> dict[str, float]:
    """Returns an epoch's figures, for each cell type that has weights.

    Skips and parameter-free operations are of the edges that the genotype keeps.
    """
    figures: dict[str, float] = {}
    for cell in [cell for cell in CELL_TYPES if cell in weights]:
        figures[f"skips_{cell}"] = skip_count(genotype, cell)
        figures[f"parameter_free_{cell}"] = parameter_free_count(genotype, cell)
        figures[f"entropy_{cell}"] = entropy(weights[cell])
    return figures


@typed
def has_collapsed(
    skips: Sequence[float],
    edges: int,
    share: float = COLLAPSE_SHARE,
    patience: int = COLLAPSE_PATIENCE,
) -> bool:
    """Tells whether more than `share` of the normal cell were skips in each of the last epochs.

    DARTS' known failure (RobustDARTS section 3): the cell fills with skip connections and its test
    accuracy falls while validation accuracy rises. One epoch with many skips is no sign of it;
    `patience` of them in a row are.

    Args:
        skips: skips in the normal cell, epoch by epoch.
        edges: edges that the derived cell has (8 in the DARTS space).
    """
    check_int("edges", edges, 1)
    check_int("patience", patience, 1)
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; 0 to 1 is allowed")
    recent = skips[-patience:]
    return len(recent) == patience and all(count > share * edges for count in recent)
