"""Implements P-DARTS (Chen et al., ICCV 2019, arXiv 1904.12760): the network deepens in stages.

Written from the paper and from a description of what its code does; that code's licence forbids
more than to read it. Where the two differ, the code is followed: dropout on identities alone,
operations dropped by argmin, ties between edges to the later one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from fastnas.bounds import Bounds, whole
from fastnas.nn import ArchParameters
from fastnas.options import option
from fastnas.reference import SkipNoise
from fastnas.spaces import AnyGenotype, CellType, Space, layout_of
from fastnas.spaces.genotype import Node
from fastnas.strategies.base import Stage, check_epoch
from fastnas.strategies.mixture import Mixture

STAGES = 3
WARM_UP = 10
"""Epochs of a stage in which the logits stand still and the dropout falls on a line."""
DECAY = 0.2

Rows = list[list[float]]
"""Probabilities of the candidates of each edge, [E][K]."""


class PDARTS(Mixture):
    """Searches in three stages, each deeper and with fewer operations on every edge.

    A stage begins with a network, logits and optimizers of its own; what it hands on are the
    operations that each edge keeps, those with the largest softmax. The epochs of a search are
    shared by its stages: 25 each of the published 75, whose learning rate begins anew.

    Identities (skips of stride 1) are dropped out, element by element, with p = p0 of the stage
    times a factor of its epoch e of E::

        (E - e - 1) / E for e < 10,  exp(-0.2 (e - 10)) from there on

    which rises again at epoch 10, where the logits begin to move (`--arch-start-epoch`). The
    gradient of the logits is clipped at 5, as that of the weights.

    A node keeps two edges with the largest probability of an operation other than `none`. While the
    normal cell has more skips than `skip_cap`, the least probable one is taken from its edge, and
    operations and edges are chosen again. The report has the cell of every cap.
    """

    name = "p-darts"
    source = "Chen et al., ICCV 2019, arXiv 1904.12760"
    defaults = {
        "layers": 5,
        "epochs": 75,
        "batch_size": 96,
        "lr_min": 0.0,
        "arch_lr": 6e-4,
        "arch_start_epoch": WARM_UP,
    }
    arch_grad_clip = 5.0
    chooses_edges = True

    stage_layers: str = option("0,6,12", "cells that each stage has beyond --layers")
    stage_operations: str = option("5,3", "operations an edge keeps after the first two stages")
    skip_dropout: str = option(
        "0,0.4,0.7", "p0 of the dropout on identities by stage (CIFAR-100: 0.1,0.2,0.3)"
    )
    skip_cap: int = option(2, "most skips of the derived normal cell", whole(0, 1000))

    def __post_init__(self) -> None:
        super().__post_init__()
        self._layers = _numbers("stage_layers", self.stage_layers, STAGES, whole(0, 200))
        self._kept = _numbers("stage_operations", self.stage_operations, STAGES - 1, whole(1, 64))
        self._dropout = _numbers(
            "skip_dropout", self.skip_dropout, STAGES, Bounds(0, 1, below=True)
        )
        self._stage = 0

    def space(self, space: Space) -> Space:
        """Returns the space of the first stage.

        Raises:
            ValueError: its cells keep all edges, or its edges have too few operations.
        """
        space = super().space(space)
        offered = [space.num_candidates(cell) for cell in space.cell_types]
        counts = [min(offered), *self._kept]
        if any(a <= b for a, b in pairwise(counts)):
            raise ValueError(
                f"stage_operations is {self.stage_operations!r}; falling numbers below"
                f" {min(offered)} are needed, the operations that an edge of space {space.name} has"
            )
        return space

    def stages(self, layers: int, epochs: int) -> Sequence[Stage]:
        if epochs < STAGES:
            raise ValueError(f"epochs is {epochs}; at least {STAGES}, one a stage, are needed")
        each, rest = divmod(epochs, STAGES)
        return [
            Stage(layers + int(more), each + (stage < rest))
            for stage, more in enumerate(self._layers)
        ]

    def start_stage(self, stage: int) -> None:
        self._stage = stage

    def next_space(self, space: Space, arch: ArchParameters) -> Space:
        """Drops, edge by edge, the operations with the smallest softmax; ties: the first."""
        kept = int(self._kept[self._stage])
        rows = self._rows(arch)
        cells: dict[str, Any] = {
            cell: tuple(
                tuple(names[k] for k in most_probable(row, kept))
                for names, row in zip(space.candidates(cell), rows[cell])
            )
            for cell in space.cell_types
        }
        name = space.name.partition(",")[0]
        return replace(space, name=f"{name}, stage {self._stage + 2}", **cells)

    def skip_noise(self) -> SkipNoise | None:
        p0 = self._dropout[self._stage]
        return SkipNoise("bernoulli", "multiplicative", factor=p0) if p0 else None

    def noise_amplitude(self, epoch: int, epochs: int) -> float:
        check_epoch(epoch, epochs, beyond=True)
        if epoch < WARM_UP:
            return max(epochs - epoch - 1, 0) / epochs
        return math.exp(-DECAY * (epoch - WARM_UP))

    def derive_cells(self, arch: ArchParameters, space: Space) -> AnyGenotype:
        return self._derived(self._rows(arch), space, self.skip_cap)

    def findings(self, arch: ArchParameters, space: Space) -> dict[str, Any]:
        """Returns the cell for each cap on the skips, from those that it has to none."""
        rows = self._rows(arch)
        texts = {}
        for cap in range(space.kept_edges, -1, -1):
            found = self._derived(rows, space, cap)
            texts[str(cap)] = layout_of(found).text(found)
        return {"genotype_by_skip_cap": texts}

    def _rows(self, arch: ArchParameters) -> dict[str, Rows]:
        with torch.no_grad():
            return {cell: w.double().tolist() for cell, w in self.mixing_weights(arch).items()}

    def _derived(self, rows: Mapping[str, Rows], space: Space, cap: int) -> AnyGenotype:
        cells: dict[CellType, list[Node]] = {}
        for cell in space.cell_types:
            candidates = space.candidates(cell)
            # `none` is no operation of a derived cell; the others are not normalised without it.
            left = [
                [0.0 if name == "none" else p for p, name in zip(row, names)]
                for row, names in zip(rows[cell], candidates)
            ]
            cells[cell] = _capped(left, space, cell, cap if cell == "normal" else None)
        genotype: AnyGenotype = space.cell_layout.genotype(cells)
        return genotype


def most_probable(row: Sequence[float], count: int) -> list[int]:
    """Returns the places of the `count` largest, in their order; of equal ones the first go."""
    ranked = sorted(range(len(row)), key=lambda k: row[k])
    return sorted(ranked[len(row) - count :])


def _capped(rows: Rows, space: Space, cell: CellType, cap: int | None) -> list[Node]:
    """Returns the nodes of a cell with at most `cap` skips, changing `rows`; None: no cap."""
    candidates = space.candidates(cell)
    while True:
        # Of equal ones the last is chosen, as they are dropped from the first on.
        best = [most_probable(row, 1)[0] for row in rows]
        kept = _kept_edges([row[k] for row, k in zip(rows, best)], space)
        skips = [e for e in kept if candidates[e][best[e]] == "skip_connect"]
        if cap is None or len(skips) <= cap:
            break
        weakest = min(skips, key=lambda e: rows[e][best[e]])
        rows[weakest][best[weakest]] = 0.0
    nodes: list[list[tuple[str, int]]] = [[] for _ in range(space.nodes)]
    for e in kept:
        source, target = space.edges[e]
        nodes[target - space.inputs].append((candidates[e][best[e]], source))
    return [tuple(node) for node in nodes]


def _kept_edges(weights: Sequence[float], space: Space) -> list[int]:
    """Returns each node's two edges of the largest weight, of equal ones the later, in order."""
    count = space.cell_layout.edges_per_node
    assert count is not None
    kept: list[int] = []
    for node in range(space.inputs, space.inputs + space.nodes):
        into = [e for e, (_, target) in enumerate(space.edges) if target == node]
        places = most_probable([weights[e] for e in into], min(count, len(into)))
        kept += [into[k] for k in places]
    return kept


def _numbers(name: str, text: str, count: int, bounds: Bounds) -> list[float]:
    """Reads numbers with commas between; ValueError says what is needed."""
    try:
        found = [float(part) for part in text.split(",")]
        for value in found:
            bounds.check(name, int(value) if bounds.whole and value == int(value) else value)
    except (ValueError, TypeError, OverflowError):
        found = []
    if len(found) != count:
        raise ValueError(f"{name} is {text!r}; {count} numbers, {bounds}, with commas are needed")
    return found
