"""Dag: the edges of a cell, computed candidate by candidate and summed node by node."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastnas import reference
from fastnas.checks import check_type
from fastnas.nn.facts import is_plain
from fastnas.nn.fused import NoiseDraw
from fastnas.nn.mixed_op import MixedOp, Terms, select
from fastnas.nn.paths import CellWeights, Paths, add_siblings, check_paths
from fastnas.nn.recognise import CellParts
from fastnas.reference.arguments import check_shape


class Dag(reference.Dag):
    """`reference.Dag` on `mixed_norm_sum`: all terms of all edges into a node are one sum, the
    batch norms that candidates end in included, and a pool of a state is computed once for all its
    edges."""

    mixed_op = MixedOp

    def parts(self) -> CellParts | str:
        """The operations as the fused ops know them, or the first that they do not know."""
        raise NotImplementedError

    def why_not_fused(self, x: Tensor) -> str | None:
        """Why a call with x as its last input computes candidate by candidate, or None."""
        parts = self.parts()
        return parts if isinstance(parts, str) else None

    def check_weights(self, name: str, w: object, x: Tensor) -> None:
        if isinstance(w, Paths):
            check_paths(name, w, len(self._ops))
        else:
            super().check_weights(name, w, x)

    def check_draw(self, draw: object, w: CellWeights) -> None:
        """ValueError or TypeError unless there is a stream for each node of each path."""
        check_type("draw", draw, NoiseDraw, NoneType)
        paths = [] if not isinstance(w, Paths) or w.number is None else [w.number]
        if isinstance(draw, NoiseDraw):
            check_shape("draw.rng", draw.rng, [*paths, self.nodes, 2])

    def run(
        self, inputs: Sequence[Tensor], w: CellWeights, draw: NoiseDraw | None = None
    ) -> Tensor:
        """Candidate by candidate, path by path; arguments as the cell's `forward` takes them."""
        if not isinstance(w, Paths):
            return self._run_once(inputs, w, draw)
        rows = w.rows()
        groups = zip(zip(*(x.chunk(len(rows)) for x in inputs)), rows)
        out = []
        for p, (group, (row, weight)) in enumerate(groups):
            own = draw
            if draw is not None and w.number is not None:
                own = NoiseDraw(draw.level, draw.rng[p])
            out.append(self._run_once(group, weight, own, row, w.siblings))
        return out[0] if len(out) == 1 else torch.cat(out)

    def _run_once(
        self,
        inputs: Sequence[Tensor],
        w: Tensor,
        draw: NoiseDraw | None,
        row: list[int] | None = None,
        siblings: bool = False,
    ) -> Tensor:
        """Of a path, w [E], the candidates in `row` alone."""
        ops = cast(list[MixedOp], self._ops)
        if any(op.overridden("forward") or not is_plain(op) for op in ops):
            return self._by_modules(inputs, w, row, siblings)
        states = self.input_states(inputs)
        shared: list[dict[Any, Tensor]] = [{} for _ in range(len(states) + self.nodes)]
        for node in range(self.nodes):
            y = self._node(node, states, shared, w, draw, row)
            if siblings and row is not None:
                own = self.edges_into(node)
                y = add_siblings(y, w[own.start : own.stop], row[own.start : own.stop])
            states.append(y)
        return self.output(states)

    def _nothing(self, states: Sequence[Tensor]) -> Tensor:
        """A node without edges."""
        stride = 2 if self.cell_type == "reduce" else 1
        return torch.zeros_like(states[0][:, :, ::stride, ::stride])

    def _by_modules(
        self, inputs: Sequence[Tensor], w: Tensor, row: list[int] | None, siblings: bool
    ) -> Tensor:
        """Every mixed op by a call of its own, which runs its hooks; each draws its own noise."""

        def output(e: int, x: Tensor) -> Tensor:
            if row is None:
                return self._ops[e](x, w[e])
            choice = torch.tensor(row[e], device=w.device)
            return self._ops[e](x, Paths(choice, w[e], siblings))

        states = self.input_states(inputs)
        for node in range(self.nodes):
            edges = zip(self.edges_into(node), states)
            terms = [output(e, x) for e, x in edges if row is None or row[e] >= 0]
            states.append(sum(terms[1:], start=terms[0]) if terms else self._nothing(states))
        return self.output(states)

    def _node(
        self,
        node: int,
        states: list[Tensor],
        shared: list[dict[Any, Tensor]],
        w: Tensor,
        draw: NoiseDraw | None,
        row: list[int] | None,
    ) -> Tensor:
        edges = self.edges_into(node)
        outputs: list[Tensor] = []
        weight_index: list[int] = []
        noisy: list[int] = []
        norms: dict[int, nn.BatchNorm2d] = {}
        for position, (e, x, known) in enumerate(zip(edges, states, shared)):
            if row is not None and row[e] < 0:
                continue
            op = cast(MixedOp, self._ops[e])
            terms = op.terms(x, known, None if row is None else row[e])
            noisy += [len(outputs) + t for t in terms.noisy]
            norms |= {len(outputs) + t: norm for t, norm in terms.norms.items()}
            if row is None:
                weight_index += [position * w.shape[1] + k for k in terms.weight_index]
            else:
                weight_index.append(position)
            outputs += terms.outputs
        if not outputs:
            return self._nothing(states)
        flat = w[edges.start : edges.stop].reshape(-1)
        own = None if draw is None else NoiseDraw(draw.level, draw.rng[node])
        node_terms = Terms(outputs, weight_index, noisy, norms)
        return cast(MixedOp, self._ops[0]).mix(node_terms, select(flat, weight_index), own)
