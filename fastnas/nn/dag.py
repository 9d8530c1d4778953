"""Computes the edges of a cell candidate by candidate and sums them node by node."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastnas import reference
from fastnas.checks import check_type
from fastnas.nn.facts import is_plain
from fastnas.nn.mixed_op import MixedOp, Terms
from fastnas.nn.parts import CellParts
from fastnas.nn.paths import CellWeights, Paths, add_siblings, check_paths
from fastnas.nn.run import How, NoiseDraw, node_draw, run_layers
from fastnas.reference.arguments import check_shape


class Dag(reference.Dag):
    """Runs `reference.Dag` on `mixed_norm_sum`: all terms of all edges into a node are one sum.

    The batch norms that candidates end in are included, and a pool of a state is computed once for
    all its edges.
    """

    mixed_op = MixedOp
    memory = "lean"

    def how(self) -> How:
        """Says how a fused call runs."""
        return How(self.training, cast(MixedOp, self._ops[0]).noise, self.memory)

    def parts(self) -> CellParts | str:
        """Returns the operations as the fused ops know them, or why they run none of them."""
        raise NotImplementedError

    def why_not_fused(self, x: Tensor) -> str | None:
        """Says why a call with x as its last input runs the modules of some candidates, or None."""
        parts = self.parts()
        return parts if isinstance(parts, str) else parts.why_foreign

    def check_weights(self, name: str, w: object, x: Tensor) -> None:
        if isinstance(w, Paths):
            check_paths(name, w, len(self._ops))
        else:
            super().check_weights(name, w, x)

    def check_draw(self, draw: object, w: CellWeights) -> None:
        """Refuses a draw without a stream for each node of each path."""
        check_type("draw", draw, NoiseDraw, NoneType)
        paths = [] if not isinstance(w, Paths) or w.number is None else [w.number]
        if isinstance(draw, NoiseDraw):
            check_shape("draw.rng", draw.rng, [*paths, self.nodes, 2])

    def run(
        self, inputs: Sequence[Tensor], w: CellWeights, draw: NoiseDraw | None = None
    ) -> Tensor:
        """Runs candidate by candidate, path by path; takes what the cell's `forward` takes."""
        if not isinstance(w, Paths):
            return self._run_once(inputs, w, draw)
        # Which modules run is decided on the host, so reading the choices waits for the device.
        rows = w.rows()
        # Each path has batch norm statistics of its own, hence one pass for each, in order.
        groups = zip(zip(*(x.chunk(len(rows)) for x in inputs)), rows)
        out = []
        for p, (group, (row, weight)) in enumerate(groups):
            own = draw
            if draw is not None and w.number is not None:
                own = NoiseDraw(draw.level, draw.rng[p])
            out.append(self._run_once(group, weight, own, row, w.siblings))
        return out[0] if len(out) == 1 else torch.cat(out)

    def run_partly(
        self, parts: CellParts, states: Sequence[Tensor], w: Tensor, draw: NoiseDraw | None
    ) -> Tensor:
        """Runs a node's recognised candidates in one fused call, foreign ones by their modules.

        Takes preprocessed states. Foreign candidates are given them in the format of images: fused
        ones may be channels last, in which a candidate draws its noise in another order.
        """
        found, plain = list(states), [state.contiguous() for state in states]
        # Each dict holds what one edge has made of a state and others read: pools and ReLUs, by
        # settings.
        shared: list[dict[Any, Tensor]] = [{} for _ in range(len(found) + self.nodes)]
        for node, layers in enumerate(parts.node_layers):
            own = self.edges_into(node)
            # Without a batch norm there is nothing to fuse but skips: then all candidates of the
            # node run by their modules.
            only = [list(parts.edges[e].foreign) for e in own] if layers.norms else None
            y = None
            if layers.norms:
                own_w = w[own.start : own.stop]
                y = run_layers(layers, found, own_w, self.how(), node_draw(draw, node))
            found.append(self._node(node, plain, shared, w, draw, only, y))
            plain.append(found[-1].contiguous())
        return self.output(found)

    def _run_once(
        self,
        inputs: Sequence[Tensor],
        w: Tensor,
        draw: NoiseDraw | None,
        row: list[int] | None = None,
        siblings: bool = False,
    ) -> Tensor:
        """Runs all candidates; of a path, w [E], those in `row` alone."""
        ops = cast(list[MixedOp], self._ops)
        if any(op.overridden("forward") or not is_plain(op) for op in ops):
            return self._by_modules(inputs, w, row, siblings)
        states = self.input_states(inputs)
        shared: list[dict[Any, Tensor]] = [{} for _ in range(len(states) + self.nodes)]
        for node in range(self.nodes):
            own = self.edges_into(node)
            # -1 says that the edge is not in the path: no candidate of it runs.
            only = None if row is None else [[k] if (k := row[e]) >= 0 else [] for e in own]
            y = self._node(node, states, shared, w, draw, only)
            if siblings and row is not None:
                y = add_siblings(y, w[own.start : own.stop], row[own.start : own.stop])
            states.append(y)
        return self.output(states)

    def _nothing(self, states: Sequence[Tensor]) -> Tensor:
        """Returns zeros for a node without edges."""
        # The zeros have the size that the node's edges would have given it.
        stride = 2 if self.cell_type == "reduce" else 1
        return torch.zeros_like(states[0][:, :, ::stride, ::stride])

    def _by_modules(
        self, inputs: Sequence[Tensor], w: Tensor, row: list[int] | None, siblings: bool
    ) -> Tensor:
        """Runs every mixed op by a call of its own, with its hooks; each draws its own noise."""

        def output(e: int, x: Tensor) -> Tensor:
            if row is None:
                return self._ops[e](x, w[e])
            # A mixed op takes a path of one edge: choice and weight are 0-dim.
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
        only: list[list[int]] | None,
        y: Tensor | None = None,
    ) -> Tensor:
        """Sums a node's candidates, each by its module, and y.

        Args:
            w: [E, K], or [E] with one candidate for each edge in `only`.
            only: of each edge into the node the candidates that run; None: all of them.
        """
        edges = self.edges_into(node)
        outputs: list[Tensor] = []
        weight_index: list[int] = []
        noisy: list[int] = []
        norms: dict[int, nn.BatchNorm2d] = {}
        for position, (e, x, known) in enumerate(zip(edges, states, shared)):
            if only is not None and not only[position]:
                continue
            op = cast(MixedOp, self._ops[e])
            terms = op.terms(x, known, None if only is None else only[position])
            noisy += [len(outputs) + t for t in terms.noisy]
            norms |= {len(outputs) + t: norm for t, norm in terms.norms.items()}
            if w.dim() == 1:
                weight_index.append(position)
            else:
                # The index is the place in `flat`, where the weights of the node's edges stand row
                # by row.
                weight_index += [position * w.shape[1] + k for k in terms.weight_index]
            outputs += terms.outputs
        if not outputs:
            return self._nothing(states) if y is None else y
        flat = w[edges.start : edges.stop].reshape(-1)
        # The node has one stream, and its j-th noisy term adds j, as in `mixed_edges`.
        own = None if draw is None else NoiseDraw(draw.level, draw.rng[node])
        node_terms = Terms(outputs, weight_index, noisy, norms)
        return cast(MixedOp, self._ops[0]).add(y, node_terms, flat, own)
