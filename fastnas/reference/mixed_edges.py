"""y_j = sum_{e into j} sum_k w_ek o_k(x_e),  o_k(x) = BN(W (D * relu(x))) | BN(V * relu(x)) | BN(pool(x)) | pool(x) | x + noise,  BN(W u) = r W (u - mean u)
dL/du = A^T (dy - mean dy) - B (u - mean u),  A = w r W,  B = W^T (w r^2 q) W,  q = r rowsum(W o P),  P = mean(dy (u - mean u)^T).
Given statistics: dL/du = A^T dy
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastnas.checks import typed
from fastnas.reference.arguments import check_shape
from fastnas.reference.mixed_sum import standard_deviations
from fastnas.reference.relu_conv_bn import batch_norm, strided_pair
from fastnas.reference.skip_noise import apply_draw, noise_draw, philox_draw
from fastnas.spaces import EdgeTable, EdgeTerm


def _depthwise_separable(
    x: Tensor, params: Sequence[Tensor], size: int, dilation: int, stride: int
) -> Tensor:
    depthwise, pointwise = params
    pad = dilation * (size - 1) // 2
    # u [N, C, H', W'] keeps the size at stride 1: the padding is dilation (k - 1) / 2.
    u = F.conv2d(F.relu(x), depthwise, None, stride, pad, dilation, groups=x.shape[1])
    return F.conv2d(u, pointwise)


def _avg_pool(x: Tensor, stride: int) -> Tensor:
    # It averages what lies inside of the image only, as the public code does: 4 values in a corner.
    return F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)


def term_output(
    x: Tensor,
    term: EdgeTerm,
    stride: int,
    params: Sequence[Tensor],
    stats: Tensor,
    training: bool,
    eps: float,
) -> Tensor:
    """Returns o_k(x) without noise; fills `stats` [norms, 2, C] in training, else uses them."""
    if term.op == "skip":
        return x
    if term.op == "plain_avg_pool":
        return _avg_pool(x, stride)
    if term.op == "max_pool":
        z = F.max_pool2d(x, 3, stride, 1)
    elif term.op == "avg_pool":
        z = _avg_pool(x, stride)
    elif term.op == "reduce_skip":
        z = strided_pair(F.relu(x), params)
    elif term.op == "dense_conv":
        z = F.conv2d(F.relu(x), params[0], None, stride, term.size // 2)
    else:
        z = _depthwise_separable(x, params[:2], term.size, term.dilation, stride)
    # A sep_conv is two halves: v, normalised by its own statistics, is what the second one reads.
    if term.kind.halves == 2:
        v = batch_norm(z, stats[0], training, eps)
        z = _depthwise_separable(v, params[2:], term.size, term.dilation, 1)
    return batch_norm(z, stats[-1], training, eps)


@typed
def mixed_edges(
    x: Sequence[Tensor],
    w: Tensor,
    params: Sequence[Tensor],
    table: EdgeTable,
    stats: Tensor,
    *,
    training: bool = True,
    eps: float = 1e-5,
    form: str = "none",
    level: Tensor | None = None,
    rng: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """Specifies `fastnas.ops.mixed_edges`: its maths in eager torch, autograd included.

    Args:
        x: the input states, [N, C, H, W] each.
        w: [edges, candidates] mixing weights.
        params: of all terms, in their order (`EdgeKind`).
        table: the edges.
        stats: [norms, 2, C] mean and biased variance; filled in training, else used.
        form, level: the noise on skips (`SkipNoise`), "none" for no noise.
        rng: int64 [nodes, 2], Philox key and offset; the j-th skip into a node adds j.
        std: [skips], filled with the standard deviations that relative noise is scaled by.

    Returns:
        [N, outputs C, H', W'], the last nodes one after the other.
    """
    _check(x, w, params, table, stats, eps)
    states = list(x)
    for node in range(table.nodes):
        outputs = []
        ordinal = 0
        for (edge, term), row in zip(table.terms, table.rows):
            if edge.target != node:
                continue
            source = states[edge.source]
            own_params = params[row.param : row.param + term.params]
            own_stats = stats[row.norm : row.norm + term.norms]
            y = term_output(source, term, edge.stride, own_params, own_stats, training, eps)
            if form != "none" and term.kind.noisy:
                if level is None or rng is None:
                    raise ValueError(f"form is {form!r}; level and rng are needed with it")
                # std(o_k(x)) is that of the whole tensor and is a constant in backward, as in the
                # NoisyDARTS code.
                found = standard_deviations([y], [0], form)
                own_std = found[0] if found.numel() else None
                if own_std is not None and std is not None:
                    std[row.skip] = own_std
                if not (form.startswith("bernoulli") and edge.stride > 1):
                    eps_draw = philox_draw(form, rng[node], ordinal, y)
                    d = noise_draw(form, eps_draw, level, own_std, y.dtype)
                    y = apply_draw(y, d, form)
                # A strided skip without noise has its stream as well, so that others keep theirs.
                ordinal += 1
            # This is w_ek o_k(x_e), in the order of the edges and then of the terms, as eager adds
            # them.
            outputs.append(w[row.edge, term.weight].to(y.dtype) * y)
        # A node is a state for the nodes after it: x_j = sum_{e into j} sum_k w_ek o_k(x_e).
        states.append(sum(outputs[1:], outputs[0]) if outputs else _zeros(states, table, node))
    return torch.cat(states[-table.outputs :], dim=1)


def _check(
    x: Sequence[Tensor],
    w: Tensor,
    params: Sequence[Tensor],
    table: EdgeTable,
    stats: Tensor,
    eps: float,
) -> None:
    if len(x) != table.inputs:
        raise ValueError(f"x has {len(x)} states; the table has {table.inputs} inputs")
    for i, state in enumerate(x):
        check_shape(f"x[{i}]", state, [None] * 4)
        check_shape(f"x[{i}]", state, [x[0].shape[0], x[0].shape[1], None, None])
    check_shape("w", w, [len(table.edges), table.candidates])
    shapes = table.param_shapes(x[0].shape[1])
    if [tuple(p.shape) for p in params] != shapes:
        given = [list(p.shape) for p in params]
        raise ValueError(f"params have shapes {given}; {[list(s) for s in shapes]} are needed")
    check_shape("stats", stats, [table.norms, 2, x[0].shape[1]])
    if eps < 0:
        raise ValueError(f"eps is {eps}; at least 0 is needed")


def _zeros(states: Sequence[Tensor], table: EdgeTable, node: int) -> Tensor:
    """Returns the zeros of a node whose edges can do nothing."""
    edge = next(edge for edge in table.edges if edge.target == node)
    # The zeros take their size from the strided state: [N, C, ceil(H / 2), ceil(W / 2)] at stride
    # 2.
    return torch.zeros_like(states[edge.source][:, :, :: edge.stride, :: edge.stride])
