"""Builds the search network of NAS-Bench-201 in eager torch, mixed or on one sampled path.

Source: D-X-Y/AutoDL-Projects ``xautodl/models/cell_searchs``: the stages of the evaluation network
(`fastnas.nn.NB201EvalNetwork`), with a scale and a shift only in the batch norms outside of cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from fastnas.checks import typed
from fastnas.layers.nb201 import nb201_last, nb201_name, nb201_operation, nb201_stages
from fastnas.reference.arguments import check_images
from fastnas.reference.search_network import Dag, Factory, MixedOp, SearchNetwork, Weights
from fastnas.reference.single_path import SinglePathDag, SinglePathNetwork
from fastnas.reference.skip_noise import SkipNoise
from fastnas.spaces import NB201_OPS, CellType, Space

CELL_TYPE: CellType = "normal"
"""Of all cells that are searched."""


def _factory(name: str) -> Factory:
    return lambda C, stride: nb201_operation(name, C, affine=False)


class NB201Cell(Dag):
    """x_j = sum_{i<j} obar_ij(x_i) for j = 1, 2, 3; y = x_3. x [N, C, H, W] -> [N, C, H, W].

    Args:
        space: of layout nb201.
        C: channels.
        options: keyword arguments of `MixedOp`.
    """

    outputs = 1

    @typed
    def __init__(self, space: Space, C: int, **options: Any) -> None:
        super().__init__()
        # The names mean other modules here than in DARTS: skip_connect is never strided, and
        # convolutions are dense. A caller's `extra` goes before these.
        own = {name: _factory(name) for name in NB201_OPS}
        others = dict(options.pop("extra", None) or {})
        self.build_edges(space, CELL_TYPE, C, extra=own | others, **options)
        for op, names in zip(cast(list[MixedOp], self._ops), space.candidates(CELL_TYPE)):
            op.names = tuple(nb201_name(name) if name not in others else None for name in names)

    def input_states(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return list(inputs)

    def output(self, states: Sequence[Tensor]) -> Tensor:
        return states[-1]

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """Maps x [N, C, H, W] of the cell or block before and w [6, K] to [N, C, H, W]."""
        check_images("x", x)
        self.check_weights("w", w, x)
        return self.run([x], w)


class NB201SearchNetwork(SearchNetwork):
    """Runs stem, three stages of cells with residual blocks between, batch norm, ReLU, classifier.

    Args:
        space: of layout nb201.
        C: channels of the first stage, doubled by each block; 16 in the public code.
        num_classes: outputs.
        layers: cells per stage; 5 in the public code.
        in_channels: channels of the images.
        noise, skip_drop_path, extra: see `MixedOp`.
    """

    layout: ClassVar[str] = "nb201"
    cell: type[Dag] = NB201Cell

    @typed
    def __init__(
        self,
        space: Space,
        C: int,
        num_classes: int,
        layers: int,
        *,
        in_channels: int = 3,
        noise: SkipNoise | None = None,
        skip_drop_path: float = 0.0,
        extra: Mapping[str, Factory] | None = None,
    ) -> None:
        super().__init__(
            space, C, num_classes, layers, in_channels=in_channels, stem_multiplier=1,
            noise=noise, skip_drop_path=skip_drop_path, extra=extra,
        )  # fmt: skip

    def _build_cells(self, channels: int, C: int, layers: int, options: dict[str, Any]) -> int:
        def cell(channels: int) -> nn.Module:
            return self.cell(self.space, channels, **options)

        cells = list(nb201_stages(C, layers, cell))
        # Residual blocks stand among the cells, as in the public code, whose checkpoints load.
        self.cells = nn.ModuleList(module for module, _ in cells)
        last = cells[-1][1]
        self.lastact = nb201_last(last)
        return last

    def features(self, x: Tensor, weights: Weights) -> Tensor:
        for module in self.cells:
            x = module(x, weights[CELL_TYPE]) if isinstance(module, Dag) else module(x)
        return self.lastact(x)


class NB201SinglePathCell(SinglePathDag, NB201Cell):
    """Runs a cell on `HardWeights`."""


class NB201SinglePathNetwork(SinglePathNetwork, NB201SearchNetwork):
    """Runs the search network on `HardWeights`."""

    layout: ClassVar[str] = "nb201"
    cell: type[Dag] = NB201SinglePathCell


SEARCH_NETWORKS: dict[str, type[SearchNetwork]] = {
    kind.layout: kind for kind in (SearchNetwork, NB201SearchNetwork)
}
SINGLE_PATH_NETWORKS: dict[str, type[SearchNetwork]] = {
    kind.layout: kind for kind in (SinglePathNetwork, NB201SinglePathNetwork)
}
"""By the layout of the space."""
