"""Cell and SearchNetwork: a cell is one `mixed_edges`, or, where it cannot be, a sum per node."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from fastnas import reference
from fastnas.backends import MEMORY
from fastnas.backends.layout import state_format
from fastnas.nn.fused import NoiseDraw, can_run, run_cell
from fastnas.nn.memory import MemoryReport, memory_report
from fastnas.nn.mixed_op import MixedOp, Terms, reading_of, select
from fastnas.nn.recognise import CellParts
from fastnas.ops import draw_rng


class Cell(reference.Cell):
    """`reference.Cell` on fused ops: x_j = sum_{i<j} sum_k w_ijk o_ijk(x_i).

    Cells of DARTS operations run on `relu_conv_bn` and `mixed_edges`; of the edges into a node
    only the sum exists, written into the cell's output. Others compute their candidates, a pool of
    a state once for all its edges, and sum a node at once, the batch norms that candidates end in
    included. Which one is decided call by call (`why_not_fused`); `memory` is `mixed_edges`'.
    """

    mixed_op = MixedOp
    memory = "lean"

    def parts(self) -> CellParts | str:
        """The operations as the fused ops know them, or the first that they do not know."""
        return cast(CellParts | str, reading_of(self).read(self))

    def noise_form(self) -> str:
        """`SkipNoise.form` of the noise on the skips in training, or "none"."""
        noise = cast(MixedOp, self._ops[0]).noise
        return "none" if noise is None else noise.form

    def fused_parts(self, s1: Tensor) -> CellParts | str:
        """`parts`, or why a call on these states computes candidate by candidate."""
        parts = self.parts()
        if isinstance(parts, str):
            return parts
        for op, edge in zip(self._ops, parts.edges):
            reason = cast(MixedOp, op).refusal(edge)
            if reason is not None:
                return reason
        return can_run(parts, s1, self.training) or parts

    def why_not_fused(self, s1: Tensor) -> str | None:
        """Why a call on these states computes candidate by candidate, or None."""
        parts = self.fused_parts(s1)
        return parts if isinstance(parts, str) else None

    def forward(self, s0: Tensor, s1: Tensor, w: Tensor, draw: NoiseDraw | None = None) -> Tensor:
        """s0, s1 [N, C', H', W'], w [E, K] -> [N, nodes C, H, W].

        draw: level and the streams of the nodes, int64 [nodes, 2]; None draws them.
        """
        edges, candidates = len(self._ops), len(cast(MixedOp, self._ops[0])._ops)
        if w.shape != (edges, candidates):
            raise ValueError(
                f"Cell: w has shape {list(w.shape)}; [{edges}, {candidates}] is needed, edges by"
                " candidates"
            )
        parts = self.fused_parts(s1)
        if not isinstance(parts, str):
            op = cast(MixedOp, self._ops[0])
            return run_cell(
                parts, s0, s1, w, training=self.training, noise=op.noise,
                draw=draw or self._draw(op, w.device), memory=self.memory,
            )  # fmt: skip
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        pools: list[dict[Any, Tensor]] = [{} for _ in range(2 + self.nodes)]
        for node in range(self.nodes):
            states.append(self._node(node, states, pools, w, draw))
        return torch.cat(states[2:], dim=1)

    def _draw(self, op: MixedOp, device: torch.device) -> NoiseDraw | None:
        if op.noise is None or not self.training:
            return None
        return NoiseDraw(op.noise.level(op.noise_amplitude, device), draw_rng(self.nodes, device))

    def _node(
        self,
        node: int,
        states: list[Tensor],
        pools: list[dict[Any, Tensor]],
        w: Tensor,
        draw: NoiseDraw | None,
    ) -> Tensor:
        edges = self.edges_into(node)
        outputs: list[Tensor] = []
        weight_index: list[int] = []
        noisy: list[int] = []
        norms: dict[int, nn.BatchNorm2d] = {}
        for position, (e, x, shared) in enumerate(zip(edges, states, pools)):
            terms = cast(MixedOp, self._ops[e]).terms(x, shared)
            noisy += [len(outputs) + t for t in terms.noisy]
            norms |= {len(outputs) + t: norm for t, norm in terms.norms.items()}
            weight_index += [position * w.shape[1] + k for k in terms.weight_index]
            outputs += terms.outputs
        flat = w[edges.start : edges.stop].reshape(-1)
        own = None if draw is None else NoiseDraw(draw.level, draw.rng[node])
        node_terms = Terms(outputs, weight_index, noisy, norms)
        return cast(MixedOp, self._ops[0]).mix(node_terms, select(flat, weight_index), own)


class SearchNetwork(reference.SearchNetwork):
    """`reference.SearchNetwork` on fused cells; same arguments, state-dict names and results."""

    cell = Cell

    def __init__(self, *args: Any, memory: str = "lean", **options: Any) -> None:
        super().__init__(*args, **options)
        self.set_memory(memory)

    def memory_report(self, batch: int, size: int | tuple[int, int]) -> MemoryReport:
        """Bytes held for backward by a training batch, under each setting of `memory`.

        Args:
            batch: images in it.
            size: pixels of a side, or (height, width).

        Raises:
            ValueError: a cell does not run on the fused ops.
        """
        return memory_report(self, batch, (size, size) if isinstance(size, int) else size)

    def set_memory(self, memory: str) -> None:
        """What the fused cells hold for backward: "fast", "lean" or "minimal" (`mixed_edges`)."""
        if memory not in MEMORY:
            raise ValueError(f"memory is {memory!r}; allowed: {', '.join(MEMORY)}")
        self.memory = memory
        for module in self.modules():
            if isinstance(module, Cell | MixedOp):
                module.memory = memory

    def draw(self, device: torch.device | None = None) -> NoiseDraw | None:
        """The noise of one forward pass of the whole network, None where it draws none.

        Streams int64 [cells nodes, 2], drawn and copied to the device (None: left on the host) at
        once. Giving the same draw to two passes gives them the same noise (the unrolled step needs
        that).
        """
        op = next(self.mixed_ops())
        if op.noise is None or not self.training:
            return None
        rng = draw_rng(len(self.cells) * self.space.nodes)
        return NoiseDraw(op.noise.level(op.noise_amplitude), rng).to(device)

    def forward(
        self, x: Tensor, weights: reference.Weights, draw: NoiseDraw | None = None
    ) -> Tensor:
        """Images [N, in_channels, H, W], weights {"normal": [E, K], "reduce": [E, K]} -> logits."""
        self._check(x, weights)
        draw = self.draw(x.device) if draw is None else draw
        nodes = self.space.nodes
        if cast(Cell, self.cells[0]).why_not_fused(x) is None:
            # Here a copy to the layout of fused cells is one of the images only.
            x = x.contiguous(memory_format=state_format(x))
        s0 = s1 = self.stem(x)
        for i, cell in enumerate(self.cells):
            own = None
            if draw is not None:
                own = NoiseDraw(draw.level, draw.rng[i * nodes : (i + 1) * nodes])
            w = weights[cast(Cell, cell).cell_type]
            s0, s1 = s1, cell(s0, s1, w, own)
        return self.classifier(self.global_pooling(s1).flatten(1))

    def _check(self, x: Tensor, weights: reference.Weights) -> None:
        channels = self.stem[0].in_channels
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(
                f"SearchNetwork: images have shape {list(x.shape)}; [N, {channels}, H, W] is needed"
            )
        used = {cast(Cell, cell).cell_type for cell in self.cells}
        missing = sorted(used - set(weights))
        if missing:
            raise ValueError(
                f"SearchNetwork: weights has {sorted(weights)}; {', '.join(missing)} is missing"
            )
