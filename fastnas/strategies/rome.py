"""Implements ROME (Wang, Wang, Chu et al., ICCV 2023, arXiv 2011.11233): topology sampled apart.

There is no public code. The paper's: sampling (eq. 2-8), K samples averaged for the logits and
added for the weights (eq. 11, 12), K = 7, learning rates, 50 epochs, derivation. Ours, where it
says nothing: the straight-through form, one sample for all cells of a type, beta from
1e-3 N(0, 1), the temperature (linear from 10 to 0.1, GDAS), batches of 64, weight decay and Adam's
betas (DARTS), the cosine to 0.001, and one clipping at 5 after accumulation.
"""

from __future__ import annotations

from torch import Tensor

from fastnas.nn import ArchParameters
from fastnas.options import option
from fastnas.reference.sample_paths import kept_by_logits
from fastnas.spaces import AnyGenotype, Space
from fastnas.strategies.derivation import derive_path
from fastnas.strategies.single_path import SAMPLES, SinglePath


class ROME(SinglePath):
    """Samples two edges into every node by Gumbel-Top2 of beta, one logit per edge (version 2)."""

    name = "rome"
    source = "Wang et al., ICCV 2023, arXiv 2011.11233"
    drops_none = True
    defaults = {"lr": 0.05}
    # There is one logit an edge; the two edges of a node are drawn without replacement.
    topology = "top2"

    samples: int = option(7, "sub-networks in each half of a step, all on its batch", SAMPLES)

    def shares(self, arch: ArchParameters, space: Space) -> dict[str, Tensor]:
        """Returns the probability that an edge is sampled times that of its operation."""
        betas = arch.betas()
        return {
            cell: kept_by_logits(betas[cell], arch.nodes, self.topology)[:, None]
            * alpha.double().softmax(-1)
            for cell, alpha in arch.alphas().items()
        }

    def derive_cells(self, arch: ArchParameters, space: Space) -> AnyGenotype:
        """Derives argmax p(z): each node's two best edges, each with its best operation.

        Best are those with the largest beta; in version 1 it is the best pair.
        """
        return derive_path(self.likeliest(arch), space)


class ROMEv1(ROME):
    """Samples a pair of edges into every node by Gumbel-max, one logit per pair (version 1)."""

    name = "rome-v1"
    topology = "pairs"
