"""Implements beta-DARTS (Ye et al., CVPR 2022, arXiv 2203.01665): a decay of what softmax gives."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnas.bounds import Bounds
from fastnas.nn import ArchParameters
from fastnas.options import option
from fastnas.strategies.scheduled import Scheduled


class BetaDARTS(Scheduled):
    """Searches as DARTS, with a regulariser that keeps softmax(alpha) from growing and spreading.

    L = L_val + lambda_e mean over edges of log sum_k exp(alpha_k)
    lambda_e = beta_decay_weight e / E in epoch e of E, counted from 0

    The mean is over the edges of all cell types; the released code has one only, as its part for
    the DARTS space does not run. The unrolled step has the regulariser too, which that code leaves
    out there. Adam's weight decay stays, as in it.
    """

    name = "beta-darts"
    source = "Ye et al., CVPR 2022, arXiv 2203.01665"
    figure = "beta_decay"
    layout_defaults = {"nb201": {"epochs": 100}}

    beta_decay_weight: float = option(
        50.0, "lambda of the beta-decay, which it nears linearly from 0", Bounds(0, 1e6)
    )

    def level_of(self, epoch: int, epochs: int) -> float:
        return self.beta_decay_weight * epoch / epochs

    def regulariser(self, arch: ArchParameters) -> Tensor:
        rows = torch.cat([alpha.logsumexp(-1) for alpha in arch.alphas().values()])
        return self.current(rows) * rows.mean()
