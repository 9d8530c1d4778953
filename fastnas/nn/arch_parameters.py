"""Holds the architecture logits of a search."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnas.checks import typed
from fastnas.reference.sample_paths import logits_per_node
from fastnas.spaces import Space

EDGES = "_edges"


class ArchParameters(nn.Module):
    """Holds alpha [E, K] of each cell type, shared by all its cells, and beta of sampled edges.

    Apart from the network, so that its state dict is the public DARTS code's and its optimizer
    never sees a logit.

    Args:
        space: edges and candidates.
        scale: alpha and beta ~ scale N(0, 1); 1e-3 in DARTS, 0 in FairDARTS.
        topology: what beta is for: "none" (there is none), "top2" (one logit per edge, ROME v2) or
            "pairs" (one per pair of edges into a node, ROME v1); see `sample_paths`.
        tied: alpha is [1, K], of all edges.
    """

    normal: nn.Parameter
    reduce: nn.Parameter

    @typed
    def __init__(
        self,
        space: Space,
        scale: float = 1e-3,
        topology: str = "none",
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.edges = len(space.edges)
        self.nodes = tuple(range(space.inputs, space.inputs + space.nodes))
        """Predecessors of each node."""
        for cell_type in space.cell_types:
            shape = 1 if tied else self.edges, space.num_candidates(cell_type)
            # It is drawn whatever the scale, so that what is drawn next does not depend on it.
            self.register_parameter(cell_type, nn.Parameter(scale * torch.randn(shape)))
        edges = sum(logits_per_node(self.nodes, topology))
        for cell_type in space.cell_types if edges else ():
            beta = nn.Parameter(scale * torch.randn(edges))
            self.register_parameter(cell_type + EDGES, beta)

    def alphas(self) -> dict[str, Tensor]:
        """Maps each cell type to its logits of operations, [E, K] where they are tied too."""
        return {
            # This is a view, so the gradients of all edges add up in the one row.
            name: alpha.expand(self.edges, -1) if len(alpha) < self.edges else alpha
            for name, alpha in self.named_parameters()
            if not name.endswith(EDGES)
        }

    def betas(self) -> dict[str, Tensor]:
        """Maps each cell type to its logits of edges, empty where there are none."""
        return {
            name.removesuffix(EDGES): beta
            for name, beta in self.named_parameters()
            if name.endswith(EDGES)
        }
