"""Implements GDAS (Dong, Yang, CVPR 2019, arXiv 1910.04465): a sampled operation on each edge."""

from __future__ import annotations

import math

from fastnas.nn import ArchParameters
from fastnas.options import option
from fastnas.spaces import AnyGenotype, Space
from fastnas.strategies.derivation import derive_top_entries
from fastnas.strategies.margins import Undecided, within_noise
from fastnas.strategies.single_path import SinglePath

GRADIENTS = ("executed", "siblings")


class GDAS(SinglePath):
    """Samples an operation on every edge by Gumbel-softmax.

    h = onehot(argmax P) - sg(P) + P, P = softmax((log softmax(alpha) + g) / tau); h_k o_k(x).

    gdas_gradient names what reaches the logits: "executed", through the operation that ran (the
    code for the DARTS space), or "siblings", also what a node's gradient says to the operations
    that did not (the code for NAS-Bench-201, whose sum_{o != k} h_o adds 0 to every edge; a search
    there does so where it is not told).

    The genotype keeps the two largest entries of softmax(alpha) into each node, `none` apart: both
    may be of one edge, as in that code. In NAS-Bench-201 it keeps the largest entry of every edge.

    That code moves the weights first, we the logits; it uses Nesterov momentum and 250 epochs.
    """

    name = "gdas"
    source = "Dong & Yang, CVPR 2019, arXiv 1910.04465"
    defaults = {"batch_size": 256, "weight_decay": 5e-4}
    layout_defaults = {"nb201": {"batch_size": 64, "gdas_gradient": "siblings"}}

    gdas_gradient: str = option("executed", "what reaches the logits", choices=GRADIENTS)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.siblings = self.gdas_gradient == "siblings"

    def margins(self, arch: ArchParameters, space: Space) -> dict[str, list[float]]:
        """Returns the margins of the operations of edges.

        Where a node keeps its two largest entries, it is that of the second over the third, in log
        softmax.
        """
        if space.cell_layout.edges_per_node is None:
            return super().margins(arch, space)
        found: dict[str, list[float]] = {}
        for cell in space.cell_types:
            entries: dict[int, list[float]] = {}
            # Entries of different edges are compared, as the derivation does it: by shares, not by
            # logits, which a constant added to an edge would move.
            rows = zip(space.edges, arch.alphas()[cell].detach().double().log_softmax(-1).tolist())
            for ((_, node), row), names in zip(rows, space.candidates(cell)):
                kept = (v for v, name in zip(row, names) if name != "none")
                entries.setdefault(node, []).extend(kept)
            # Two entries are kept, so the node is decided by the second beside the third.
            ranked = (sorted(values, reverse=True) for values in entries.values())
            found[cell] = [r[1] - r[2] if len(r) > 2 else math.inf for r in ranked]
        return found

    def undecided(self, arch: ArchParameters, space: Space) -> dict[str, Undecided]:
        what = "edges" if space.cell_layout.edges_per_node is None else "nodes"
        return within_noise(self.margins(arch, space), self.alpha_scale, what)

    def derive_cells(self, arch: ArchParameters, space: Space) -> AnyGenotype:
        return derive_top_entries(self.mixing_weights(arch), space)
