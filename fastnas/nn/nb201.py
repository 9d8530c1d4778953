"""Runs the search network of NAS-Bench-201 on `mixed_edges`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnas import reference
from fastnas.nn.cell import FusedDag, SearchNetwork
from fastnas.nn.dag import Dag
from fastnas.nn.memory import MemoryReport
from fastnas.nn.paths import CellWeights, Paths, Weights
from fastnas.nn.run import NoiseDraw
from fastnas.reference.arguments import check_images
from fastnas.reference.nb201_search import CELL_TYPE


class NB201Cell(FusedDag, reference.NB201Cell):
    """Runs `reference.NB201Cell` as one `mixed_edges`, whose output is the last node alone.

    What is foreign to that runs as in `Cell`. On a GPU the op is made of cuDNN's convolutions and
    one `mixed_norm_sum` for each node.
    """

    def forward(self, x: Tensor, w: CellWeights, draw: NoiseDraw | None = None) -> Tensor:
        """Maps x [N, C, H, W], w [6, K] or `Paths` to [N, C, H, W]; paths and draw as in `Cell`."""
        check_images("x", x)
        self.check_weights("w", w, x)
        self.check_draw(draw, w)
        return self.run_fused([x], w, draw)


class NB201SearchNetwork(SearchNetwork, reference.NB201SearchNetwork):
    """Runs `reference.NB201SearchNetwork` on such cells; same arguments, names and results."""

    cell: type[reference.Dag] = NB201Cell

    def memory_report(self, batch: int, size: int | tuple[int, int]) -> MemoryReport:
        """Is refused: what torch holds of the residual blocks is not known before a run.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "memory_report: what the residual blocks of NAS-Bench-201 hold is not known before a"
            " run"
        )

    def features(self, x: Tensor, weights: Weights, draw: NoiseDraw | None = None) -> Tensor:
        w = weights[CELL_TYPE]
        paths = (w.number or 1) if isinstance(w, Paths) else 1
        i = 0
        for module in self.cells:
            if isinstance(module, Dag):
                # i counts cells, not the residual blocks between them, as the streams do.
                x = module(x, w, self._draw_of(i, draw, w))
                i += 1
            else:
                x = _path_by_path(module, x, paths)
        return _path_by_path(self.lastact, x, paths)


def _path_by_path(module: nn.Module, x: Tensor, paths: int) -> Tensor:
    """Runs the module on [paths N, ...], with the statistics of a call for each path."""
    return module(x) if paths == 1 else torch.cat([module(group) for group in x.chunk(paths)])
