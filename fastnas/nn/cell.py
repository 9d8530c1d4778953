"""Holds Cell and SearchNetwork: a cell is one `mixed_edges`, or else a sum per node."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import Any, cast

import torch
from torch import Tensor

from fastnas import reference
from fastnas.backends import MEMORY
from fastnas.backends.layout import state_format
from fastnas.checks import check_choice, check_hint, check_int, check_type
from fastnas.nn.built import HasReading
from fastnas.nn.dag import Dag
from fastnas.nn.memory import MemoryReport, memory_report
from fastnas.nn.mixed_op import MixedOp
from fastnas.nn.parts import CellParts
from fastnas.nn.paths import CellWeights, Paths, Weights, number_of_paths, stem_once
from fastnas.nn.run import NoiseDraw, can_run, preprocessed, run_states
from fastnas.ops import draw_noise
from fastnas.ops.device_choice import sampled_params, stays_on_device
from fastnas.reference.arguments import check_images


class FusedDag(HasReading, Dag):
    """Runs all nodes of a cell as one `mixed_edges` where its candidates are known to that."""

    def parts(self) -> CellParts | str:
        return cast(CellParts | str, self._reading.read(self))

    def noise_form(self) -> str:
        """Returns `SkipNoise.form` of the noise on the skips in training, or "none"."""
        noise = cast(MixedOp, self._ops[0]).noise
        return "none" if noise is None else noise.form

    def fused_parts(self, x: Tensor) -> CellParts | str:
        """Returns `parts`, or why a call whose last input is x computes candidate by candidate."""
        parts = self.parts()
        return parts if isinstance(parts, str) else can_run(parts, x, self.training) or parts

    def why_not_fused(self, x: Tensor) -> str | None:
        parts = self.fused_parts(x)
        return parts if isinstance(parts, str) else parts.why_foreign

    def run_fused(self, inputs: Sequence[Tensor], w: CellWeights, draw: NoiseDraw | None) -> Tensor:
        """Computes the cell on checked inputs, on the fused ops as far as they know it."""
        x, number = inputs[-1], w.number if isinstance(w, Paths) else None
        # One path's batch decides, since each path is normalised by itself: a path of one value per
        # channel cannot be trained on.
        parts = self.fused_parts(x if number is None else x[: x.shape[0] // number])
        if isinstance(parts, str) or (isinstance(w, Paths) and parts.why_foreign):
            return self.run(inputs, w, draw)
        how = self.how()
        # Every mixed op of a cell has the same noise, so the first one speaks for all.
        draw = draw or self._draw(cast(MixedOp, self._ops[0]), x.device, number)
        states = preprocessed(parts, inputs, how, number or 1)
        if isinstance(w, Paths) or parts.why_foreign is None:
            return run_states(parts, states, w, how, draw)
        return self.run_partly(parts, states, w, draw)

    def _draw(self, op: MixedOp, device: torch.device, paths: int | None) -> NoiseDraw | None:
        if op.noise is None or not self.training:
            return None
        rng = draw_noise(self.nodes * (paths or 1), device)
        shape = (self.nodes, 2) if paths is None else (paths, self.nodes, 2)
        return NoiseDraw(op.noise.level(op.noise_amplitude, device), rng.view(shape))


class Cell(FusedDag, reference.Cell):
    """Runs `reference.Cell` on fused ops: x_j = sum_{i<j} sum_k w_ijk o_ijk(x_i).

    Cells of DARTS operations run on `relu_conv_bn` and `mixed_edges`; of the edges into a node
    only the sum exists, written into the cell's output. With foreign candidates each node is a call
    of `mixed_edges` and the sum of that with what the foreign ones compute, the batch norms that
    they end in included. Where nothing can be fused, all candidates are computed so, a pool of a
    state once for all its edges. That is decided call by call (`why_not_fused`); `memory` is
    `mixed_edges`'.
    """

    def forward(
        self, s0: Tensor, s1: Tensor, w: CellWeights, draw: NoiseDraw | None = None
    ) -> Tensor:
        """Maps s0, s1 [N, C', H', W'], w [E, K] or `Paths` to [N, nodes C, H, W].

        Of several paths the images are [paths N, ...], path by path, and statistics are per path.

        draw: level and the streams of the nodes, int64 [nodes, 2], of several paths
        [paths, nodes, 2]; None draws them.
        """
        check_images("s0", s0)
        check_images("s1", s1)
        self.check_weights("w", w, s1)
        self.check_draw(draw, w)
        return self.run_fused([s0, s1], w, draw)


class SearchNetwork(reference.SearchNetwork):
    """Runs `reference.SearchNetwork` on fused cells; same arguments, state-dict names, results."""

    cell: type[reference.Dag] = Cell

    def __init__(self, *args: Any, memory: str = "lean", **options: Any) -> None:
        super().__init__(*args, **options)
        self.set_memory(memory)

    def memory_report(self, batch: int, size: int | tuple[int, int]) -> MemoryReport:
        """Counts the bytes held for backward by a training batch, under each setting of `memory`.

        Args:
            batch: images in it.
            size: pixels of a side, or (height, width).

        Raises:
            ValueError: a cell does not run on the fused ops.
        """
        sides = (size, size) if isinstance(size, int) else size
        check_int("batch", batch, 1)
        check_hint("size", sides, tuple[int, int])
        for side in sides:
            check_int("size", side, 1)
        return memory_report(self, batch, sides)

    def set_memory(self, memory: str) -> None:
        """Sets what fused cells hold for backward: "fast", "lean" or "minimal" (`mixed_edges`)."""
        check_choice("memory", memory, MEMORY)
        self.memory = memory
        for module in self.modules():
            if isinstance(module, FusedDag | MixedOp):
                module.memory = memory

    def draw(self, device: torch.device | None = None, paths: int = 1) -> NoiseDraw | None:
        """Draws the noise of one forward pass of the whole network, None where there is none.

        Streams int64 [paths cells nodes, 2], drawn and copied to the device (None: left on the
        host) at once. Giving the same draw to two passes gives them the same noise (the unrolled
        step needs that).
        """
        check_int("paths", paths, 1)
        op = next(self.mixed_ops())
        if op.noise is None or not self.training:
            return None
        # Streams are drawn on the host, from torch's CPU generator; `to` moves them and the level
        # in one copy.
        rng = draw_noise(paths * len(list(self.dags())) * self.space.nodes)
        return NoiseDraw(op.noise.level(op.noise_amplitude), rng).to(device)

    def on_device(self, passes: Sequence[Weights]) -> list[tuple[list[Tensor], Tensor]]:
        """Returns the parameters of each candidate, and bool []: whether a pass ran it.

        Outside of `choice_on_device` it returns nothing: there what did not run has no gradient.
        """
        if not stays_on_device():
            return []
        found: list[tuple[list[Tensor], Tensor]] = []
        for kind in {dag.cell_type: None for dag in self.dags()}:
            paths = [w for w in (weights[kind] for weights in passes) if isinstance(w, Paths)]
            cells = [cast(Dag, dag).parts() for dag in self.dags() if dag.cell_type == kind]
            parts = [c for c in cells if not isinstance(c, str) and c.why_foreign is None]
            if not paths or not parts:
                continue
            choices = torch.cat([w.choice.reshape(-1, w.choice.shape[-1]) for w in paths])
            # Cells of a type are built of one space and share their table.
            table = parts[0].layers.table
            # moved is bool [params], over all paths of all passes, and stays on the device.
            moved = sampled_params(table, choices).any(0).unbind()
            first = 0
            for _, term in table.terms:
                last = first + term.params
                if term.params:
                    layers = [conv for c in parts for conv in c.layers.convs[first:last]]
                    found.append(([conv.weight for conv in layers], moved[first]))
                first = last
        return found

    def forward(self, x: Tensor, weights: Weights, draw: NoiseDraw | None = None) -> Tensor:
        """Maps images [N, in_channels, H, W] to logits [N, classes].

        Args:
            weights: of all cell types: {"normal": [E, K], "reduce": [E, K]}, or `Paths`. Of
                several the stem runs once, and the logits are [paths, N, classes]; parameters,
                statistics and gradients are those of a pass for each, one after the other.
            draw: of `draw`.
        """
        self.check_inputs(x, weights)
        check_type("draw", draw, NoiseDraw, NoneType)
        paths = number_of_paths("weights", weights)
        draw = self.draw(x.device, paths or 1) if draw is None else draw
        if cast(Dag, self.cells[0]).why_not_fused(x) is None:
            # Convert the layout here, once and on the small images, rather than on the wider
            # activations later.
            x = x.contiguous(memory_format=state_format(x))
        found = self.features(stem_once(self.stem, x, paths), weights, draw)
        logits = self.classifier(self.global_pooling(found).flatten(1))
        return logits if paths is None else logits.unflatten(0, (paths, -1))

    def features(self, x: Tensor, weights: Weights, draw: NoiseDraw | None = None) -> Tensor:
        s0 = s1 = x
        for i, cell in enumerate(cast(list[Cell], self.cells)):
            own = weights[cell.cell_type]
            s0, s1 = s1, cell(s0, s1, own, self._draw_of(i, draw, own))
        return s1

    def _draw_of(self, i: int, draw: NoiseDraw | None, w: CellWeights) -> NoiseDraw | None:
        """Returns the streams of cell i."""
        if draw is None:
            return None
        paths = w.number if isinstance(w, Paths) else None
        nodes = self.space.nodes
        needed = (paths or 1) * len(list(self.dags())) * nodes
        if len(draw.rng) != needed:
            raise ValueError(
                f"SearchNetwork: draw has {len(draw.rng)} streams; {needed} are needed"
            )
        # Streams lie path by path, in them cell by cell, in them node by node.
        here = slice(i * nodes, (i + 1) * nodes)
        rng = draw.rng[here] if paths is None else draw.rng.unflatten(0, (paths, -1))[:, here]
        return NoiseDraw(draw.level, rng)
