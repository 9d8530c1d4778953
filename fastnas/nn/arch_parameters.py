"""The architecture logits of a search."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnas.spaces import CELL_TYPES, Space


class ArchParameters(nn.Module):
    """alpha [E, K] of each cell type, shared by all cells of the type.

    Apart from the network, so that its state dict is the public DARTS code's and its optimizer
    never sees a logit.

    Args:
        space: edges and candidates.
        scale: alpha ~ scale N(0, 1); 1e-3 in DARTS, 0 in FairDARTS.
    """

    normal: nn.Parameter
    reduce: nn.Parameter

    def __init__(self, space: Space, scale: float = 1e-3) -> None:
        super().__init__()
        for cell_type in CELL_TYPES:
            shape = len(space.edges), space.num_candidates(cell_type)
            self.register_parameter(cell_type, nn.Parameter(scale * torch.randn(shape)))

    def alphas(self) -> dict[str, Tensor]:
        """Cell type to its logits."""
        return {"normal": self.normal, "reduce": self.reduce}
