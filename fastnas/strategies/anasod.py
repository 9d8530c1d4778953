"""Searches operation distributions by gradient (ANASOD), with logits tied across the edges.

w_c = softmax(alpha_c), the same on every edge of the cells of type c. The paper (Wan et al., WACV
2022) has a differentiable search; whether it is the mixture or samples could not be read, so both
are here, and everything but the encoding is our reconstruction.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastnas.bounds import whole
from fastnas.checks import check_int
from fastnas.nn import ArchParameters
from fastnas.options import option
from fastnas.spaces import AnyGenotype, Space
from fastnas.spaces.distribution import ANASOD, OperationDistribution, slots_of
from fastnas.strategies.base import Strategy, check_logits
from fastnas.strategies.darts import DARTS
from fastnas.strategies.gdas import GDAS
from fastnas.strategies.margins import Undecided, within_noise


class OnDistributions(Strategy):
    """Derives an operation distribution and samples cells from it.

    Where cells cannot hold `none`, its share is removed and the rest renormalised.
    """

    source = ANASOD
    tied = True

    final_cells: int = option(
        8, "cells drawn at the end, the supernet's best kept", whole(1, 10**5)
    )

    def space(self, space: Space) -> Space:
        found = super().space(space)
        # It refuses a space with other candidates on other edges, which have no distribution in
        # common.
        slots_of(found)  # the same candidates on every edge
        return found

    def findings(self, arch: ArchParameters, space: Space) -> dict[str, Any]:
        """Returns the distribution, by cell type and operation."""
        return {"distribution": self.distribution(arch, space).as_dict()}

    def distribution(self, arch: ArchParameters, space: Space) -> OperationDistribution:
        """Returns p_c proportional to softmax(alpha_c) on the operations that cells have.

        Raises:
            ValueError: a logit is not finite.
        """
        check_logits(arch, space)
        ops = slots_of(space).ops
        shares: dict[str, tuple[float, ...]] = {}
        for cell_type in space.cell_types:
            names = space.candidates(cell_type)[0]
            # The logits are tied, so the row of the first edge is that of every edge.
            w = torch.softmax(arch.alphas()[cell_type][0].detach().double(), -1)
            kept = w[[names.index(op) for op in ops]]
            shares[cell_type] = tuple((kept / kept.sum()).tolist())
        return OperationDistribution(ops, shares)

    def undecided(self, arch: ArchParameters, space: Space) -> dict[str, Undecided]:
        """Counts distributions whose extreme logits are as close as two initial ones."""
        rows = {cell: alpha[0].detach() for cell, alpha in arch.alphas().items()}
        # One distribution is one choice: it says nothing as long as its shares are as close to each
        # other as those that the search began with.
        margins = {cell: [float(row.max() - row.min())] for cell, row in rows.items()}
        return within_noise(margins, self.alpha_scale, "distributions")

    def derive(self, arch: ArchParameters, space: Space) -> AnyGenotype:
        """Returns the first cell of `cells`."""
        return self.cells(arch, space, 1)[0]

    def cells(self, arch: ArchParameters, space: Space, count: int) -> list[AnyGenotype]:
        """Draws cells from the distribution; always the same of one distribution."""
        check_int("count", count, 1)
        # The seed is fixed: a report, a resumed run and `fastnas sample` must tell the same cells
        # of one distribution.
        rng = np.random.default_rng(0)
        drawn = self.distribution(arch, space)
        return [drawn.sample(slots_of(space), rng) for _ in range(count)]


class AnasodDARTS(OnDistributions, DARTS):
    """Mixes all operations, weighted alike on every edge."""

    name = "anasod-darts"


class AnasodGDAS(OnDistributions, GDAS):
    """Samples one operation on every edge, all from the same distribution."""

    name = "anasod-gdas"
