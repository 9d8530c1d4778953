"""weight = B_st A_st: A_st = 1 + At - sg(At) at o* = argmax_o (alpha + g), At = softmax((log softmax(alpha) + g)/tau), B alike of beta
dalpha = At (c - <c, At>)/tau, c = dweight at the sampled entries, 0 elsewhere; dbeta alike with Bt over a node's edges or pairs.

All of it is fp64: perturbed logits are compared, and a last bit that differs between backends would
draw another path. A row of logits is one small tensor in a program of one warp.
"""  # noqa: E501

import triton
import triton.language as tl

from fastnas.kernels.gumbel import gumbel_draws


@triton.jit
def _perturbed(rng_ptr, ordinal, logits_ptr, first, o, m):
    """Returns logits + g in fp64, the first logit with element `first` of the stream."""
    b_logits = tl.load(logits_ptr + o, mask=m, other=0.0).to(tl.float64)
    return b_logits + gumbel_draws(rng_ptr, ordinal, first + o)


@triton.jit
def _largest(v, o, m):
    """Returns value and index of the largest under the mask: NaN first, then the lower index.

    tl.max does not promise to keep a NaN, so NaN are looked for apart.
    """
    nan = m & (v != v)
    has_nan = tl.max(nan.to(tl.int32), axis=0) > 0
    top = tl.max(tl.where(m & (v == v), v, float("-inf")), axis=0)
    wins = tl.where(has_nan, nan, m & (v == top))
    index = tl.min(tl.where(wins, o, 2147483647), axis=0)
    return tl.where(has_nan, float("nan"), top), index


@triton.jit
def _straight_through(top, tau):
    """Returns 1 + At - sg(At) of a row whose largest is `top`: 1, or NaN where softmax is NaN."""
    return 1.0 + 0.0 * (top / tau)


@triton.jit
def _relaxed_grads(v, c, tau, o, m):
    """Returns the gradient of a row of perturbed logits v with cotangent c.

    The largest is taken off before the exponential, so that a small tau does not overflow it.
    """
    top, _ = _largest(v, o, m)
    e = tl.where(m, tl.exp(v / tau - top / tau), 0.0)
    soft = e / tl.sum(e, axis=0)
    dot = tl.sum(tl.where(m, c * soft, 0.0), axis=0)
    return soft * (c - dot) / tau


@triton.jit
def _node(node, NODES: tl.constexpr, TOPOLOGY: tl.constexpr):
    """Returns a node's first edge, edges, first logit and logits.

    NODES is known when compiling and `node` when running: the sums go over all nodes before it.
    """
    edge, n, logit, count = 0, 0, 0, 0
    for j in tl.static_range(len(NODES)):
        is_before = j < node
        logits = NODES[j] if TOPOLOGY == "top2" else NODES[j] * (NODES[j] - 1) // 2
        edge += tl.where(is_before, NODES[j], 0)
        logit += tl.where(is_before, logits, 0)
        n += tl.where(j == node, NODES[j], 0)
        count += tl.where(j == node, logits, 0)
    return edge, n, logit, count


@triton.jit
def _edge_pair(n, ordinal):
    """Returns the pair of that number: (0, 1), (0, 2), ..., (n - 2, n - 1)."""
    first = ordinal * 0
    while ordinal >= n - 1 - first:
        ordinal -= n - 1 - first
        first += 1
    return first, first + 1 + ordinal


@triton.jit
def _edges_kept(v, n, tau, o, m, TOPOLOGY: tl.constexpr):
    """Returns the two edges of a node by its perturbed logits v, and their B_st."""
    top, first = _largest(v, o, m)
    B_st = _straight_through(top, tau)
    if TOPOLOGY == "top2":
        _, second = _largest(v, o, m & (o != first))
        return first, second, tl.where(n == 2, 1.0, B_st)
    else:
        first, second = _edge_pair(n, first)
        return first, second, B_st


@triton.jit
def sample_paths_fwd_kernel(
    alpha_ptr,
    beta_ptr,
    tau_ptr,
    rng_ptr,
    op_ptr,
    weight_ptr,
    types,
    edges,
    ops,
    logits,
    NODES: tl.constexpr,
    TOPOLOGY: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Samples, in a program for each sample and node, its topology, then its edges' operations."""
    sample = tl.program_id(0).to(tl.int64)
    i_type = sample % types
    tau = tl.load(tau_ptr)
    edge, n, logit, count = _node(tl.program_id(1), NODES, TOPOLOGY)
    if TOPOLOGY != "none":
        o_row = tl.arange(0, BLOCK_L)
        m_row = o_row < count
        p_beta = beta_ptr + i_type * logits + logit
        b_row = _perturbed(rng_ptr, 1, p_beta, sample * logits + logit, o_row, m_row)
        first, second, B_st = _edges_kept(b_row, n, tau, o_row, m_row, TOPOLOGY)
    o = tl.arange(0, BLOCK_O)
    m = o < ops
    for i in range(n):
        item = sample * edges + edge + i
        p_alpha = alpha_ptr + (i_type * edges + edge + i) * ops
        v = _perturbed(rng_ptr, 0, p_alpha, item * ops, o, m)
        top, index = _largest(v, o, m)
        weight = _straight_through(top, tau)
        if TOPOLOGY != "none":
            kept = (i == first) | (i == second)
            index = tl.where(kept, index, -1)
            # B_st A_st is 1, or NaN where a softmax is. A plain 0 keeps NaN of other edges out.
            weight = tl.where(kept, weight * B_st, 0.0)
        tl.store(op_ptr + item, index.to(tl.int64))
        tl.store(weight_ptr + item, weight)


@triton.jit
def sample_paths_dalpha_kernel(
    dweight_ptr,
    op_ptr,
    alpha_ptr,
    tau_ptr,
    rng_ptr,
    dalpha_ptr,
    paths,
    types,
    edges,
    ops,
    BLOCK_O: tl.constexpr,
):
    """Sums, in a program for each type and edge, its row of dalpha, path after path.

    The noise is drawn again. An edge that a path does not keep (op < 0) adds nothing.
    """
    i_type = tl.program_id(0).to(tl.int64)
    edge = tl.program_id(1)
    tau = tl.load(tau_ptr)
    row = (i_type * edges + edge) * ops
    o = tl.arange(0, BLOCK_O)
    m = o < ops
    d = tl.zeros([BLOCK_O], tl.float64)
    for path in range(paths):
        item = (path * types + i_type) * edges + edge
        op = tl.load(op_ptr + item)
        c = tl.where(o == op, tl.load(dweight_ptr + item).to(tl.float64), 0.0)
        v = _perturbed(rng_ptr, 0, alpha_ptr + row, item * ops, o, m)
        # An edge that is not in the path adds 0, also where its softmax is NaN.
        d += tl.where(op >= 0, _relaxed_grads(v, c, tau, o, m), 0.0)
    tl.store(dalpha_ptr + row + o, d, mask=m)


@triton.jit
def sample_paths_dbeta_kernel(
    dweight_ptr,
    op_ptr,
    beta_ptr,
    tau_ptr,
    rng_ptr,
    dbeta_ptr,
    paths,
    types,
    edges,
    logits,
    NODES: tl.constexpr,
    TOPOLOGY: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Sums, in a program for each type and node, its part of dbeta, path after path.

    In `pairs` the cotangents of both edges kept meet at the logit of their pair.
    """
    i_type = tl.program_id(0).to(tl.int64)
    tau = tl.load(tau_ptr)
    edge, n, logit, count = _node(tl.program_id(1), NODES, TOPOLOGY)
    row = i_type * logits + logit
    o = tl.arange(0, BLOCK_L)
    m = o < count
    d = tl.zeros([BLOCK_L], tl.float64)
    for path in range(paths):
        sample = path * types + i_type
        item = sample * edges + edge
        kept = tl.load(op_ptr + item + o, mask=o < n, other=-1) >= 0
        c = tl.load(dweight_ptr + item + o, mask=kept, other=0.0).to(tl.float64)
        if TOPOLOGY == "pairs":
            first = tl.min(tl.where(kept, o, BLOCK_L), axis=0)
            second = tl.max(tl.where(kept, o, 0), axis=0)
            # `at` is the number of (first, second) among (0, 1), (0, 2), ..., (n - 2, n - 1).
            at = first * (2 * n - first - 1) // 2 + second - first - 1
            c = tl.where(o == at, tl.sum(c, axis=0), 0.0)
        v = _perturbed(rng_ptr, 1, beta_ptr + row, sample * logits + logit, o, m)
        d += _relaxed_grads(v, c, tau, o, m)
    if TOPOLOGY == "top2":  # both edges of a node of two are kept in any case
        d = tl.where(n == 2, 0.0, d)
    tl.store(dbeta_ptr + row + o, d, mask=m)


def _constants(nodes, topology):
    """Returns a topology's constants; rows hold a node's edges or logits, whichever are more."""
    longest = max(max(n, n * (n - 1) // 2 if topology == "pairs" else 0) for n in nodes)
    block = triton.next_power_of_2(longest)
    return {"NODES": tuple(nodes), "TOPOLOGY": topology, "BLOCK_L": block}


# Perturbed logits are compared: contracted multiply-adds would draw other paths than elsewhere.
LAUNCH = {"num_warps": 1, "enable_fp_fusion": False}


def _sizes(call):
    """Returns edges, operations and cell types of a call (`fastnas.backends.calls.PathsCall`)."""
    edges, ops = call.alpha.shape[-2:]
    return edges, ops, call.alpha.numel() // (edges * ops)


def forward(call, op, weight):
    """Fills op and weight."""
    edges, ops, types = _sizes(call)
    samples = call.paths * types
    if not samples:
        return
    beta = call.beta
    sample_paths_fwd_kernel[(samples, len(call.nodes))](
        call.alpha, beta, call.tau, call.rng, op, weight, types, edges, ops,
        0 if beta is None else beta.shape[-1],
        **_constants(call.nodes, call.topology), BLOCK_O=triton.next_power_of_2(ops), **LAUNCH,
    )  # fmt: skip


def backward(dweight, call, op, dalpha, dbeta):
    """Fills dalpha, and dbeta unless call.beta is None."""
    edges, ops, types = _sizes(call)
    # CUDA refuses a grid of size 0.
    if not types:
        return
    beta, tau, rng = call.beta, call.tau, call.rng
    sample_paths_dalpha_kernel[(types, edges)](
        dweight, op, call.alpha, tau, rng, dalpha, op.shape[0], types, edges, ops,
        BLOCK_O=triton.next_power_of_2(ops), **LAUNCH,
    )  # fmt: skip
    if beta is not None:
        sample_paths_dbeta_kernel[(types, len(call.nodes))](
            dweight, op, beta, tau, rng, dbeta, op.shape[0], types, edges, beta.shape[-1],
            **_constants(call.nodes, call.topology), **LAUNCH,
        )  # fmt: skip
