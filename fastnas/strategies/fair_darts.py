"""Implements FairDARTS (Chu et al., ECCV 2020, arXiv 1911.12126): candidates do not compete."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from fastnas.bounds import Bounds
from fastnas.checks import check_type
from fastnas.nn import ArchParameters
from fastnas.options import option
from fastnas.spaces import AnyGenotype, Space
from fastnas.strategies.cost import shares_of_weights
from fastnas.strategies.derivation import derive_top_edges
from fastnas.strategies.mixture import Mixture
from fastnas.strategies.single_level import Both, both_gradients
from fastnas.strategies.steps import ArchStep, WeightStep

LOSSES = ("l2", "l1")


class FairDARTS(Mixture):
    """Weighs each candidate by a sigmoid of its own, which a loss drives to 0 or 1.

    obar(x) = sum_o sigmoid(alpha_o) o(x).

    The architecture loss is L_val + w01 L01 (eq. 5), over all entries of both cell types:
        l2: L01 = -mean((sigmoid(alpha) - 1/2)^2),  l1: L01 = -mean|sigmoid(alpha) - 1/2|

    The genotype keeps at most two edges a node, those whose sigma reaches `threshold`. A search
    too short to reach it anywhere would derive an empty cell; then each node keeps its best edge.

    With `single_level` weights and logits move together, by one pass over the training batch, whose
    loss has the zero-one loss too; the images of the logits are for the validation alone.

    In NAS-Bench-201 (our reading; the paper has nothing on it) `none` is no candidate but what an
    edge is whose sigmas stay below `threshold`. A cell that this leaves without a way from its
    input to its output keeps the best operation of every edge.
    """

    name = "fair-darts"
    source = "Chu et al., ECCV 2020, arXiv 1911.12126"
    drops_none = drops_derived_none = True
    # sigma(0) = 1/2: no candidate begins nearer to 0 or 1, the ends that the zero-one loss drives
    # to.
    alpha_scale = 0.0
    alpha_betas = (0.9, 0.999)
    defaults = {"arch_lr": 3e-3, "lr": 0.005, "batch_size": 128}

    zero_one_weight: float = option(10.0, "w01: weight of the zero-one loss", Bounds(0, 1e6))
    zero_one_loss: str = option("l2", "form of the zero-one loss", choices=LOSSES)
    threshold: float = option(0.85, "sigma from which an edge is kept", Bounds(0, 1))
    single_level: bool = option(False, "move weights and logits together, on the training batch")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.single_level and self.order == 2:
            raise ValueError("single_level is true, but order is 2, which looks ahead from one")
        self._both: Both | None = None
        """Of the pass in the logits' half of a step, for the half of the weights."""

    def arch_gradient(self, step: ArchStep) -> tuple[list[Tensor], Tensor]:
        if not self.single_level:
            return super().arch_gradient(step)
        # The weights have their gradient before the logits move, from the same pass.
        self._both = both_gradients(step)
        return self._both.alphas, self._both.loss

    def params_gradient(self, step: WeightStep) -> tuple[Tensor, Tensor]:
        found, self._both = self._both, None
        # Before arch_start_epoch the logits have no half of the step.
        if found is None:
            return super().params_gradient(step)
        for p, gradient in zip(step.params, found.params):
            p.grad = gradient
        # They are unscaled already, so `finish`, which would divide them, is not for them.
        step.precision.processes.join_gradients(step.params)
        clip_grad_norm_(step.params, step.grad_clip)
        return found.plain_loss, found.logits

    def not_capturable(self) -> str | None:
        if self.single_level:
            return "with single_level a half of a step leaves its gradients to the other"
        return super().not_capturable()

    def mixing_weights(self, arch: ArchParameters) -> dict[str, Tensor]:
        check_type("arch", arch, ArchParameters)
        return {cell: torch.sigmoid(alpha) for cell, alpha in arch.alphas().items()}

    def regulariser(self, arch: ArchParameters) -> Tensor:
        # The loss is one mean over all entries of both cell types, not a mean of their means.
        sigma = torch.cat([w.flatten() for w in self.mixing_weights(arch).values()]) - 0.5
        distance = sigma.square() if self.zero_one_loss == "l2" else sigma.abs()
        return -self.zero_one_weight * distance.mean()

    def shares(self, arch: ArchParameters, space: Space) -> dict[str, Tensor]:
        """Returns the sigmas themselves where the derived cell has room for them all.

        Their sum is brought down to one operation an edge and two edges a node, and never up: the
        derivation drops what stays below `threshold`.
        """
        weights = self.mixing_weights(arch)
        return {c: shares_of_weights(weights[c], space, c, fewer=True) for c in space.cell_types}

    def derive_cells(self, arch: ArchParameters, space: Space) -> AnyGenotype:
        weights, layout = self.mixing_weights(arch), space.cell_layout
        kept = derive_top_edges(weights, space, threshold=self.threshold)
        best = derive_top_edges(weights, space, edges_per_node=1)
        cells, rest = layout.cells(kept), layout.cells(best)
        for cell_type in space.cell_types:
            # No edge of this cell type reaches the threshold, or too few for a way through: better
            # a cell of the best edges than none.
            if not layout.is_connected(kept, cell_type):
                cells[cell_type] = rest[cell_type]
        genotype: AnyGenotype = layout.genotype(cells)
        return genotype
