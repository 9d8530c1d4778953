"""Samples paths as eager code does, indices taken to the host: the benchmarks' baselines.

`gdas_tables` is public GDAS code (xautodl, search_model_gdas_nasnet.py) in its own words: all edges
of a cell type drawn at once, then for each its index by `.item()` and its weight picked out. There
every cell of the network picks them out again; here once per type. `edge_by_edge` draws each edge
on its own, and does what there is no public code for: the topologies of ROME.

Noise is drawn from torch's generator in float32, whatever the dtype of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnas.reference.sample_paths import logits_per_node, node_pairs, straight_through

EagerSample = tuple[list[int], Tensor]
"""The operation of each edge, or -1, and its weight: the leading axes of alpha, then edges."""


def gumbel_softmax(logits: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns onehot(o*) - sg(At) + At, o* [..., 1] and At, drawn again where it is not finite."""
    while True:
        # -ln E with E ~ Exp(1) is Gumbel(0, 1); of E = 0 it is inf, which the loop draws again.
        g = -torch.empty_like(logits, dtype=torch.float32).exponential_().log()
        soft = torch.softmax((torch.log_softmax(logits, -1) + g) / tau, -1)
        index = soft.max(-1, keepdim=True)[1]
        one_hot = torch.zeros_like(soft).scatter_(-1, index, 1.0)
        # h = onehot(o*) - sg(At) + At: 1 up to rounding in value, At in gradient.
        hard = one_hot - soft.detach() + soft
        if torch.isinf(g).any() or torch.isinf(soft).any() or torch.isnan(soft).any():
            continue
        return hard, index, soft


def gdas_tables(alpha: Tensor, tau: float) -> EagerSample:
    """Samples with every edge kept; alpha [..., E, O]."""
    ops, weights = [], []
    for table in alpha.reshape(-1, *alpha.shape[-2:]).unbind():
        hard, index, _ = gumbel_softmax(table, tau)
        for edge in range(table.shape[0]):
            # Here the host waits for the device, once for every edge.
            chosen = int(index[edge].item())
            ops.append(chosen)
            weights.append(hard[edge][chosen])
    return ops, torch.stack(weights).view(alpha.shape[:-1])


def edge_by_edge(
    alpha: Tensor, beta: Tensor | None, nodes: Sequence[int], topology: str, tau: float
) -> EagerSample:
    """Samples edge by edge, of alpha [..., E, O] and beta as `sample_paths` takes them."""
    ops, weights = [], []
    tables = alpha.reshape(-1, *alpha.shape[-2:]).unbind()
    betas = [None] * len(tables) if beta is None else beta.reshape(len(tables), -1).unbind()
    for table, logits in zip(tables, betas):
        B_st = _edges_kept(logits, nodes, topology, tau)
        for edge, row in enumerate(table.unbind()):
            if edge not in B_st:
                ops.append(-1)
                weights.append(row.new_zeros(()))
                continue
            hard, index, _ = gumbel_softmax(row, tau)
            chosen = int(index.item())
            ops.append(chosen)
            b = B_st[edge]
            weights.append(hard[chosen] if b is None else hard[chosen] * b)
    return ops, torch.stack(weights).view(alpha.shape[:-1])


def _edges_kept(
    logits: Tensor | None, nodes: Sequence[int], topology: str, tau: float
) -> dict[int, Tensor | None]:
    """Returns B_st of the edges in the path; None where it is 1 and has no gradient."""
    if logits is None:
        return dict.fromkeys(range(sum(nodes)))
    kept: dict[int, Tensor | None] = {}
    first = 0
    for n, row in zip(nodes, logits.split(logits_per_node(nodes, topology))):
        hard, index, soft = gumbel_softmax(row, tau)
        if topology == "pairs":
            # ROME v1 (eq. 4-6) samples one pair of predecessors, whose two edges share its weight.
            pair = int(index.item())
            kept |= dict.fromkeys((first + int(i) for i in node_pairs(n)[:, pair]), hard[pair])
        elif n == 2:
            kept |= dict.fromkeys((first, first + 1))
        else:
            # ROME v2 (eq. 7-8) takes the two largest of the relaxed logits, each with its own
            # weight.
            top = soft.topk(2).indices.tolist()
            kept |= {first + i: straight_through(soft[i]) for i in top}
        first += n
    return kept
