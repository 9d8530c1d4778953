"""Tells whether a search has decided anything: margins beside what initial noise would give.

Logits begin as s N(0, 1), s = `Strategy.alpha_scale` (1e-3 in DARTS). The difference of two such
logits is N(0, 2 s^2), so without any search it stays within three of its standard deviations,

    m = 3 sqrt(2) s,

in 99.7 % of cases. A choice whose margin, the logit that was kept less the next, is at most m is
one that the initial noise may have made: it is undecided. Where s is 0 only a tie is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from fastnas.spaces import CellType, Space

SIGMAS = 3.0


def noise_margin(scale: float) -> float:
    """Returns m of logits that began as scale N(0, 1)."""
    return SIGMAS * math.sqrt(2) * scale


@dataclass(frozen=True)
class Undecided:
    """Counts the choices of a cell type that are within the initial noise.

    Attributes:
        count, of: choices within it, and all there are.
        what: choices are about: "edges" (their operation), "nodes" (their entries), or
            "distributions".
    """

    count: int
    of: int
    what: str

    def __str__(self) -> str:
        return f"{self.count} of {self.of} {self.what}"


def operation_margins(
    logits: Tensor, space: Space, cell_type: str, drops_none: bool
) -> list[float]:
    """Returns, for each edge, the best logit less the next, infinite where it is alone.

    Args:
        logits: [E, K].
        drops_none: `none` is no candidate of a derived edge.
    """
    margins, candidates = [], space.candidates(cast(CellType, cell_type))
    for row, names in zip(logits.detach().double().tolist(), candidates):
        kept = sorted(v for v, name in zip(row, names) if not (drops_none and name == "none"))
        # An edge with one candidate left has nothing to decide.
        margins.append(kept[-1] - kept[-2] if len(kept) > 1 else math.inf)
    return margins


def within_noise(
    margins: Mapping[str, list[float]], scale: float, what: str
) -> dict[str, Undecided]:
    """Counts, by cell type, the margins that are at most m."""
    bound = noise_margin(scale)
    return {
        cell: Undecided(sum(margin <= bound for margin in row), len(row), what)
        for cell, row in margins.items()
    }
