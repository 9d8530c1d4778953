"""weight = B_st A_st: A_st = 1 + At - sg(At) at o* = argmax_o (alpha + g), At = softmax((log softmax(alpha) + g)/tau), B alike of beta
dalpha = At (c - <c, At>)/tau, c = dweight at the sampled entries, 0 elsewhere; dbeta alike with Bt over a node's edges or pairs.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastnas.checks import check_choice, check_int, check_type, typed
from fastnas.reference.arguments import check_paths, check_shape
from fastnas.reference.gumbel import gumbel_draw

TOPOLOGIES = ("none", "top2", "pairs")


def logits_per_node(nodes: Sequence[int], topology: str) -> list[int]:
    """Counts each node's topology logits: one per edge, one per pair of them, or none."""
    check_choice("topology", topology, TOPOLOGIES)
    check_type("nodes", nodes, list, tuple)
    for n in nodes:
        check_int("nodes: the predecessors of one", n, 1)
    if topology == "top2":
        return list(nodes)
    return [n * (n - 1) // 2 if topology == "pairs" else 0 for n in nodes]


def node_pairs(n: int, device: torch.device | None = None) -> Tensor:
    """Returns int64 [2, n(n - 1)/2]: n predecessors' pairs (0, 1), (0, 2), ..., (n - 2, n - 1)."""
    return torch.triu_indices(n, n, 1, device=device)


def relaxed(perturbed: Tensor, tau: Tensor | float) -> Tensor:
    """Returns softmax((log softmax(logits) + g)/tau) of logits + g; what they differ by cancels."""
    return torch.softmax(perturbed / tau, -1)


def straight_through(soft: Tensor) -> Tensor:
    """Returns 1 + soft - sg(soft), in the order that gives exactly 1, or NaN where soft is NaN."""
    return 1 + (soft - soft.detach())


def largest(perturbed: Tensor, count: int = 1) -> Tensor:
    """Returns the largest indices along the last axis, [..., count]: NaN first, then the lower."""
    return torch.sort(perturbed, dim=-1, descending=True, stable=True).indices[..., :count]


@typed
def sample_paths(
    alpha: Tensor,
    beta: Tensor | None,
    nodes: Sequence[int],
    topology: str,
    tau: Tensor | float,
    rng: Tensor,
    paths: int,
) -> tuple[Tensor, Tensor]:
    """Specifies `fastnas.ops.sample_paths`, autograd by straight-through included.

    ROME (ICCV 2023): operations eq. 2-3, pairs (v1) eq. 4-6, Gumbel-Top2 (v2) eq. 7-8. Ours, where
    the paper prints nothing: the straight-through form and that gradient flows through what is
    executed only, as in public GDAS code. That is one entry of At for each edge kept, Bt of the
    same edge in v2, and in v1 It of the sampled pair for both its edges.

    A node of two predecessors keeps both, whatever its logits are: v1 has one pair, so its gradient
    is 0 by the formula; in v2 that of Bt would be noise, so Bt is left out (ours).

    Which are largest is decided on logits + g in float64: softmax, a temperature and what
    log softmax subtracts do not change an order.

    Args:
        alpha: [..., E, O] operation logits, edges node by node.
        beta: [..., E] for "top2", [..., sum n(n - 1)/2] for "pairs", None for "none".
        nodes: predecessors of each node; they sum to E.
        topology: "none", "top2" or "pairs".
        tau: temperature, a number or a 0-d tensor.
        rng: int64 [2], Philox key and offset; g of alpha at that offset, of beta at the next, the
            element index counting path, leading axes and logit.
        paths: samples to draw.

    Returns:
        op int64 [paths, ..., E], the sampled operation or -1, and weight, typed as alpha.
    """
    check_paths(alpha, beta, nodes, logits_per_node(nodes, topology), tau)
    check_shape("rng", rng, [2])
    check_int("paths", paths, 1)
    g = gumbel_draw(rng, 0, (paths, *alpha.shape))
    perturbed = alpha.to(torch.float64) + g
    # o* = argmax_o (alpha + g), [paths, ..., E, 1], in float64 on every backend (eq. 2).
    op = largest(perturbed.detach())
    # A_st = 1 + At - sg(At) at the sampled operation (eq. 3).
    weight = straight_through(relaxed(perturbed, tau).gather(-1, op)).squeeze(-1)
    op = op.squeeze(-1)
    if beta is None:
        return op, weight.to(alpha.dtype)
    g = gumbel_draw(rng, 1, (paths, *beta.shape))
    logits = (beta.to(torch.float64) + g).split(logits_per_node(nodes, topology), -1)
    parts = [_edges_kept(row, n, topology, tau) for row, n in zip(logits, nodes)]
    kept, B_st = (torch.cat(part, -1) for part in zip(*parts))
    # Edges that are kept have B_st A_st. Others have a plain 0, so that their NaN does not enter
    # the path.
    weight = torch.where(kept, weight * B_st, 0)
    return torch.where(kept, op, -1), weight.to(alpha.dtype)


def _edges_kept(
    perturbed: Tensor, n: int, topology: str, tau: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Says which two of a node's n edges are kept, bool [..., n], and their B_st."""
    soft = relaxed(perturbed, tau)
    if topology == "top2":
        edges = largest(perturbed.detach(), 2)
        # Two edges of two are kept whatever the logits are: Bt has nothing to learn there.
        B_st = torch.ones_like(soft) if n == 2 else straight_through(soft)
    else:
        pair = largest(perturbed.detach())
        # edges [..., 2] are both of the sampled pair.
        edges = node_pairs(n, perturbed.device).t()[pair.squeeze(-1)]
        B_st = straight_through(soft.gather(-1, pair)).expand(*soft.shape[:-1], n)
    kept = torch.zeros(*soft.shape[:-1], n, dtype=torch.bool, device=soft.device)
    return kept.scatter(-1, edges, True), B_st


@typed
def sample_paths_grads(
    alpha: Tensor,
    beta: Tensor | None,
    nodes: Sequence[int],
    topology: str,
    tau: Tensor | float,
    rng: Tensor,
    op: Tensor,
    dweight: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Returns (dalpha, dbeta) by the second line at the top, summed over the paths in float64.

    The Jacobian of softmax, applied to a cotangent c that is not 0 at the sampled entries only:
    the operation of each edge kept; in "top2" both edges of a node, in "pairs" their pair, with
    the sum of what its two edges get. A row without a sampled entry gets 0, whatever it holds.
    """
    check_paths(alpha, beta, nodes, logits_per_node(nodes, topology), tau)
    check_shape("rng", rng, [2])
    check_shape("op", op, [None, *alpha.shape[:-1]])
    check_shape("dweight", dweight, op.shape)
    kept = op >= 0
    c = torch.where(kept, dweight.to(torch.float64), 0)
    g = gumbel_draw(rng, 0, (op.shape[0], *alpha.shape))
    # An op that is no operation, as where it was overwritten from outside, meets no logit.
    is_op = op[..., None] == torch.arange(alpha.shape[-1], device=op.device)
    sampled = torch.where(is_op, c[..., None], 0)
    d = _relaxed_grads(sampled, alpha, g, tau)
    dalpha = torch.where(kept[..., None], d, 0).sum(0).to(alpha.dtype)
    if beta is None:
        return dalpha, None
    g = gumbel_draw(rng, 1, (op.shape[0], *beta.shape))
    rows = logits_per_node(nodes, topology)
    given = zip(beta.split(rows, -1), g.split(rows, -1))
    cs = _topology_cotangents(c, kept, nodes, topology)
    parts = [_relaxed_grads(c_node, *row, tau) for c_node, row in zip(cs, given)]
    if topology == "top2":
        parts = [torch.zeros_like(d) if n == 2 else d for d, n in zip(parts, nodes)]
    return dalpha, torch.cat(parts, -1).sum(0).to(beta.dtype)


def _relaxed_grads(c: Tensor, logits: Tensor, g: Tensor, tau: Tensor | float) -> Tensor:
    soft = relaxed(logits.to(torch.float64) + g, tau)
    # d softmax(l / tau)^T c = At (c - <c, At>) / tau.
    return soft * (c - (c * soft).sum(-1, keepdim=True)) / tau


def _topology_cotangents(
    c: Tensor, kept: Tensor, nodes: Sequence[int], topology: str
) -> Iterator[Tensor]:
    for c_node, is_kept in zip(c.split(list(nodes), -1), kept.split(list(nodes), -1)):
        if topology == "top2":
            yield c_node
        else:
            i, k = node_pairs(c_node.shape[-1], c.device)
            # The logit of the pair that was sampled gets what both its edges get; no other pair has
            # both.
            both = is_kept[..., i] & is_kept[..., k]
            yield torch.where(both, c_node[..., i] + c_node[..., k], 0)


def kept_by_logits(beta: Tensor, nodes: Sequence[int], topology: str) -> Tensor:
    """Returns the probability [E] with which each edge is one of the two that a node keeps.

    With p = softmax(beta) over the edges of a node, two are drawn without replacement ("top2",
    which Gumbel-Top2 does), or p is of its pairs ("pairs")::

        top2:   p_i (1 + sum_{j != i} p_j / (1 - p_j))       pairs:   sum of p over the pairs with i

    Source: Wang et al., ICCV 2023 (ROME), eq. 4 to 8; Plackett (1975) for the order of a draw.
    """
    found = []
    for row, n in zip(beta.double().split(logits_per_node(nodes, topology)), nodes):
        p = row.softmax(-1)
        if topology == "pairs":
            pairs = node_pairs(n, p.device)
            found.append(p.new_zeros(n).index_add(0, pairs[0], p).index_add(0, pairs[1], p))
            continue
        # p_i / (1 - p_j) as the softmax without j: where one edge has nearly all, the difference
        # has no digit.
        first = torch.eye(n, dtype=torch.bool, device=p.device)
        second = row.expand(n, n).masked_fill(first, -float("inf")).softmax(-1)
        found.append(p + (p[:, None] * second).sum(0))
    return torch.cat(found)
