"""Computes tables of mixed_edges with dense convolutions by torch's convolutions and kernels' sums.

On a GPU cuDNN's convolutions are hard to beat, and all that follows them is one pass of
`mixed_norm_sum` for each node. Everything is launched by the table alone, so a CUDA graph holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastnas.backends.address import ROWS
from fastnas.backends.calls import EdgesCall, Noise, NormSumCall
from fastnas.backends.eager import EagerEdges
from fastnas.backends.layout import in_format, state_format
from fastnas.backends.op_table import Kernel
from fastnas.backends.saved import SavedTensors, accumulation_dtype
from fastnas.spaces import Edge, EdgeTable, EdgeTerm
from fastnas.spaces.edge_table import TermRow

KINDS = {"skip", "dense_conv", "plain_avg_pool"}
"""What is composed here; a table that has others beside dense convolutions runs eagerly."""


def is_dense(table: EdgeTable) -> bool:
    """Tells whether kernels that know depthwise convolutions alone cannot run the table."""
    dense = any(term.op in ("dense_conv", "plain_avg_pool") for _, term in table.terms)
    return dense or table.outputs < table.nodes


class Term(NamedTuple):
    edge: Edge
    term: EdgeTerm
    row: TermRow


class DenseEdges:
    """Runs tables that have dense convolutions node by node, all others by the kernels given.

    Args:
        edges: the kernels of all other tables.
        norm_sum: kernels of `mixed_norm_sum` on the same device.
    """

    def __init__(self, edges: Kernel[EdgesCall], norm_sum: Kernel[NormSumCall]) -> None:
        self.edges, self.norm_sum = edges, norm_sum
        self.takes_choice = getattr(edges, "takes_choice", False)

    def forward(self, call: EdgesCall) -> tuple[Tensor, list[Tensor]]:
        other = self._other(call)
        if other is not None:
            return other.forward(call)
        x, table = in_format(call.x, ROWS), call.table
        size = table.node_size([t.shape for t in x])
        saved = SavedTensors.empty(
            x[0], table, size, call.noise.form, call.memory, call.keep_gram, call.running is None
        )
        if call.running is not None:
            saved.stats.copy_(call.running)
        states = list(x)
        for node in range(table.nodes):
            terms = _terms(table, node)
            if not terms:
                states.append(x[0].new_zeros(size))
                continue
            z = [_output(t, states, call.params) for t in terms]
            self._keep(terms, z, saved)
            norms = _norms(terms)
            given: list[Tensor | None] = [None, None]
            if call.running is not None:
                given = [*saved.stats[norms].unbind(1)]
            y, (std, *found) = self.norm_sum.forward(self._sum(call, node, terms, z, given))
            if call.running is None:
                saved.stats[norms] = torch.stack(found, 1) if found[0].numel() else saved.stats[:0]
            if std.numel():
                saved.std[_skips(terms)] = std
            states.append(y)
        for node in range(table.nodes - table.outputs):
            saved.inner[node].view(size).copy_(states[table.inputs + node])
        out = torch.cat(states[-table.outputs :], dim=1)
        return out.contiguous(memory_format=state_format(out)), list(saved)

    def backward(
        self, grad: Tensor, call: EdgesCall, saved: list[Tensor], needs: list[bool]
    ) -> list[Tensor]:
        other = self._other(call)
        if other is not None:
            return other.backward(grad, call, saved, needs)
        table = call.table
        dout, out, *x = in_format([grad, saved[0], *call.x], ROWS)
        own = SavedTensors(*in_format(saved[1:], ROWS))
        size = table.node_size([t.shape for t in x])
        inner = table.nodes - table.outputs
        shown = out.chunk(table.outputs, dim=1)
        states = [*x, *(own.inner[j].view(size) for j in range(inner)), *shown]
        needs_dw, needs_dp = needs[0], any(needs[1 + len(x) :])
        grads: list[Tensor | None] = [None] * (table.inputs + inner) + [
            *dout.chunk(table.outputs, 1)
        ]
        dparams = [torch.zeros_like(p, memory_format=ROWS) if needs_dp else p for p in call.params]
        dw = call.w.new_zeros(call.w.numel(), dtype=accumulation_dtype(grad.dtype))
        for node in reversed(range(table.nodes)):
            terms, dy = _terms(table, node), grads[table.inputs + node]
            if dy is None or not terms:
                continue
            z = [self._kept(t, own, states, call.params) for t in terms]
            stats = own.stats[_norms(terms)].unbind(1)
            training = call.running is None
            summed = self._sum(call, node, terms, z, [None, None] if training else [*stats])
            kept = [own.std[_skips(terms)] if own.std.numel() else own.std]
            kept += stats if training else ()
            own_dw, *dz = self.norm_sum.backward(
                dy.contiguous(), summed, [t.contiguous() for t in kept], [True] * (1 + len(z))
            )
            dw.index_copy_(0, _places(table, node, dw.device), own_dw.to(dw.dtype))
            for t, d in zip(terms, dz):
                _add_gradient(t, d, states, call.params, grads, dparams, needs_dp)
        found = [dw.view(call.w.shape).to(call.w.dtype)] if needs_dw else []
        layout = state_format(out)
        for state, g, need in zip(x, grads, needs[1:]):
            if need:
                dx = torch.zeros_like(state) if g is None else g
                found.append(dx.contiguous(memory_format=layout))
        return found + [d for d, need in zip(dparams, needs[1 + len(x) :]) if need]

    def _other(self, call: EdgesCall) -> Kernel[EdgesCall] | None:
        """Returns what runs the call if it is not composed here."""
        if not is_dense(call.table):
            return self.edges
        known = all(term.op in KINDS for _, term in call.table.terms)
        return None if known and call.x[0].numel() else EagerEdges()

    def _sum(
        self, call: EdgesCall, node: int, terms: Sequence[Term], z: list[Tensor],
        stats: list[Tensor | None],
    ) -> NormSumCall:  # fmt: skip
        """Returns the sum that is a node; `stats` are the mean and variance to normalise by."""
        w = call.w.flatten()[_places(call.table, node, call.w.device)]
        noise = call.noise
        if noise.form != "none":
            noisy = [i for i, t in enumerate(terms) if t.term.kind.noisy]
            rng = None if noise.rng is None else noise.rng[node]
            noise = (
                Noise(noisy, noise.form, noise.level, rng)
                if noisy
                else Noise([], "none", None, None)
            )
        has_norm = [t.term.norms > 0 for t in terms]
        mean, var = stats
        return NormSumCall(z, w, has_norm, call.eps, mean, var, noise)

    def _keep(self, terms: Sequence[Term], z: Sequence[Tensor], saved: SavedTensors) -> None:
        for t, own in zip(terms, z):
            if t.row.kept >= 0 and saved.z.numel():
                saved.z[t.row.kept].view(own.shape).copy_(own)

    def _kept(
        self, t: Term, saved: SavedTensors, states: Sequence[Tensor], params: Sequence[Tensor]
    ) -> Tensor:
        if t.row.kept >= 0 and saved.z.numel():
            return saved.z[t.row.kept].view(states[t.edge.source].shape)
        return _output(t, states, params)


@lru_cache(maxsize=256)
def _terms(table: EdgeTable, node: int) -> tuple[Term, ...]:
    every = (Term(edge, term, row) for (edge, term), row in zip(table.terms, table.rows))
    return tuple(t for t in every if t.edge.target == node)


@lru_cache(maxsize=256)  # a captured graph cannot make them
def _places(table: EdgeTable, node: int, device: torch.device) -> Tensor:
    """Returns where the weights of a node's terms stand in w [edges, candidates]."""
    own = [t.row.edge * table.candidates + t.row.weight for t in _terms(table, node)]
    return torch.tensor(own, dtype=torch.int64, device=device)


def _norms(terms: Sequence[Term]) -> slice:
    """Returns the rows of a node's batch norms, which stand one after the other."""
    first = terms[0].row.norm
    return slice(first, first + sum(t.term.norms for t in terms))


def _skips(terms: Sequence[Term]) -> slice:
    own = [t.row.skip for t in terms if t.row.skip >= 0]
    return slice(own[0], own[-1] + 1) if own else slice(0, 0)


def _output(t: Term, states: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """Returns what the candidate makes of its source, up to the batch norm."""
    x = states[t.edge.source]
    if t.term.op == "skip":
        return x.contiguous()
    if t.term.op == "plain_avg_pool":
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False).contiguous()
    return F.conv2d(x.relu(), params[t.row.param], None, 1, t.term.size // 2).contiguous()


def _add_gradient(
    t: Term, dz: Tensor, states: Sequence[Tensor], params: Sequence[Tensor],
    grads: list[Tensor | None], dparams: list[Tensor], needs_dp: bool,
) -> None:  # fmt: skip
    """Adds what a candidate's output gives its source and its parameter."""
    source = t.edge.source
    x = states[source]
    aten = torch.ops.aten
    if t.term.op == "skip":
        dx = dz
    elif t.term.op == "plain_avg_pool":
        dx = aten.avg_pool2d_backward(dz, x, [3, 3], [1, 1], [1, 1], False, False, None)
    else:
        pad, i = [t.term.size // 2] * 2, t.row.param
        dx, dV, _ = aten.convolution_backward(
            dz, x.relu(), params[i], None, [1, 1], pad, [1, 1], False, [0, 0], 1,
            [True, needs_dp, False],
        )  # fmt: skip
        dx = aten.threshold_backward(dx, x, 0)
        if needs_dp:
            dparams[i].copy_(dV)
    before = grads[source]
    grads[source] = dx if before is None else before + dx
