"""Holds mixed_edges: its description and its public function; edge_checks.py checks. Kernels:

backends/native_cells.py -> csrc/cpu/mixed_edges.cpp (csrc/cpu/{depthwise,product,pool}.h)
                            csrc/cuda/mixed_edges.cu (its plan and tiles beside it)
backends/eager.py        -> reference/mixed_edges.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastnas.backends import KERNELS, SavedTensors, accumulation_dtype
from fastnas.backends.calls import NO_NOISE, EdgesCall, Noise
from fastnas.backends.dense_edges import is_dense
from fastnas.backends.eager import reference_edges
from fastnas.backends.layout import state_format
from fastnas.ops.autocast import follow_autocast, without_autocast
from fastnas.ops.batch_norm import Running, stack_running, update_running
from fastnas.ops.call import FIRST, Needs, Op
from fastnas.ops.checks import as_list
from fastnas.ops.device_choice import sampled_norms, stays_on_device
from fastnas.ops.edge_checks import Setting, check_call, check_choice, check_path, read_choice
from fastnas.ops.mixed_sum import draw_noise
from fastnas.reference import SkipNoise
from fastnas.spaces import EdgeTable


def _fake(call: EdgesCall) -> tuple[Tensor, list[Tensor]]:
    like, table = call.x[0], call.table
    N, C, rows, cols = size = table.node_size([t.shape for t in call.x])
    out = like.new_empty(N, table.outputs * C, rows, cols)
    saved = SavedTensors.empty(
        like, table, size, call.noise.form, call.memory, call.keep_gram, call.running is None,
        sampled=call.choice is not None,
    )  # fmt: skip
    return out.contiguous(memory_format=state_format(like)), list(saved)


def _reference(call: EdgesCall) -> Tensor:
    """Runs the reference; `choice` is [edges]."""
    if call.choice is not None:
        path = call.table.path(call.choice.tolist())
        own = [call.params[i] for i in path.params]
        running = None if call.running is None else call.running[list(path.norms)]
        call = call._replace(
            w=call.w[list(path.edges), None], params=own, table=path.table, running=running
        )
    like = call.x[0]
    wide = accumulation_dtype(like.dtype)
    return reference_edges(call, like.new_empty(call.table.norms, 2, like.shape[1], dtype=wide))


def _prepare(call: EdgesCall, needs: Needs) -> EdgesCall:
    # needs is [w, *x, *params]. cov(u) is [halves, C, C]; the architecture step, which moves no
    # parameter, need not hold it, and constant statistics have no use for it.
    return call._replace(keep_gram=call.running is None and any(needs[1 + len(call.x) :]))


def _has_inner_edges(call: EdgesCall) -> bool:
    """Tells whether nodes are states of later edges, which backward reads."""
    return any(edge.source >= call.table.inputs for edge in call.table.edges)


MIXED_EDGES = Op(
    "mixed_edges",
    EdgesCall,
    leaves=("w", "x", "params"),
    fake=_fake,
    reference=_reference,
    format=lambda call, grad: state_format(call.x[0]),
    prepare=_prepare,
    shows=FIRST,
    # Backward reads the nodes as the states of later edges; saved already as the output, they cost
    # nothing more.
    saves_output=True,
    reads_output=_has_inner_edges,
)


def mixed_edges(
    x: Sequence[Tensor],
    w: Tensor,
    params: Sequence[Tensor],
    table: EdgeTable,
    *,
    choice: Tensor | None = None,
    running: Sequence[Running] | None = None,
    momentum: float = 0.1,
    training: bool = True,
    eps: float = 1e-5,
    noise: SkipNoise | None = None,
    level: Tensor | None = None,
    rng: Tensor | None = None,
    memory: str = "lean",
    backend: str | None = None,
) -> Tensor:
    """Computes the nodes of a cell, y_j = sum_{e into j} sum_k w_ek o_k(x_e), from its states.

    Every batch norm that follows a depthwise and a pointwise convolution is folded through the
    Gram matrix of the depthwise output u: var(W u) = diag(W cov(u) W^T), so W u is never formed
    for its statistics and u is computed again where it is needed instead of being stored. Pools,
    their statistics and the deviations for the noise are computed once per state.

    Where channels of u nearly cancel in a row of W, var(W u) is as exact as cov(u) lets it be: its
    relative error is about eps sum_ij |W_i S_ij W_j| / var, S = cov(u) in float32 (float64).

    Squares of what is normalised, and a gradient divided by them, have to stay within the range of
    float32 (1e-38 to 1e38). A variance beyond it is NaN, as are the results, where torch sums it in
    float64.

    On CUDA, products over up to 256 channels run on tensor cores, their operands rounded to TF32
    (10 bits of fraction): in bfloat16 and float16, and in float32 where torch's switch for matmul,
    `torch.backends.cuda.matmul.fp32_precision`, is "tf32".

    Under `torch.autocast` the op is cast as a convolution is: x and params to the dtype of
    autocast, unless float64 or without params. w, the statistics and the sums are not, and the
    gradients are of the dtypes that were given.

    With `choice` each edge runs the one candidate that was sampled for it:
    y_j = sum_{e into j, k_e >= 0} w_e o_{k_e}(x_e). What is not sampled is not computed: its
    parameters get no gradient (None), its running statistics stand still. Several paths share
    one call and nothing else: they give what a call for each, one after the other, gives.

    Args:
        x: the input states, [N, C, H, W] each, float32, bfloat16, float16 (fused on CUDA only) or
            float64 (not on CUDA). None of C, H and W may be 0.
            Of several paths [paths N, C, H, W], path by path.
        w: [edges, candidates] mixing weights, floating point; may be wider than x. With `choice`
            of its shape, the weight of the chosen candidate.
        params: of all terms, in their order (`EdgeTerm`), of the dtype of x.
        table: the edges (`EdgeTable`).
        choice: int64 [edges] or [paths, edges] on the device of x: the column of the candidate
            that an edge runs, -1: the edge is not there. A node that nothing enters is zeros.
        running: (mean, variance) of each batch norm in the order of the terms: updated in
            training, used outside of it.
        momentum: of the running statistics, 0 to 1.
        training: whether the statistics are the batch's. Outside of it they are constants, also
            for the gradients.
        eps: added to every variance, which is kept in float32 (float64): below 1e-38 it is 0.
        noise: on every skip (`SkipNoise`); None draws none.
        level: float64 [2] (`SkipNoise.level`); by default amplitude 1.
        rng: int64 [nodes, 2] (of several paths [paths, nodes, 2]), Philox key and offset; the j-th
            skip into a node adds j. By default drawn from torch's generator.
        memory: what is held for backward besides the states: "fast" the input of every second
            half, the output of every dense 3x3 convolution and the last depthwise output of the
            5x5 kernels, "lean" the former two, "minimal" none.
        backend: see `mixed_sum`.

    Returns:
        [N, outputs C, H', W'] (or [paths N, ...]), the last nodes of the table (by default all)
        one after the other: channels last in memory on the CPU, NCHW on a GPU.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is allowed.
        BackendError: the explicit backend cannot run this.
    """
    x, params = as_list("mixed_edges", "x", x), as_list("mixed_edges", "params", params)
    if running is not None:
        running = as_list("mixed_edges", "running", running, "pairs of Tensors")
    x, params = follow_autocast(x, params)
    drawn = Noise([], "none", level, rng)
    call = EdgesCall(x, w, params, table, None, eps, drawn, choice, memory, keep_gram=False)
    setting = Setting(running, momentum, training, noise, backend)
    with without_autocast(x[0] if x else None):
        if choice is None:
            return _run(call, setting)
        check_choice(call, choice, running)
        if stays_on_device() and _takes_choice(call, backend):
            return _along_device_paths(call, choice, setting)
        return _along_paths(call, choice, setting)


def _takes_choice(call: EdgesCall, backend: str | None) -> bool:
    """Tells whether the backend's kernels read the sampled candidates from the device."""
    kernel = KERNELS["mixed_edges", MIXED_EDGES.choose(call, backend)]
    return bool(getattr(kernel, "takes_choice", False)) and not is_dense(call.table)


def _run(call: EdgesCall, setting: Setting) -> Tensor:
    """Computes one path, or all candidates; `choice` [edges] stays on the device."""
    # The checks come before any stream is drawn: a call that is refused must not move torch's
    # generator.
    check_call(call, setting)
    call = call._replace(noise=_drawn(call, setting), running=_given(call, setting))
    out, stats = MIXED_EDGES(call, setting.backend)
    if setting.training and setting.running is not None:
        # This is N H W, since out is [N, outputs C, H, W].
        samples = out.numel() // out.shape[1]
        moved = None if call.choice is None else sampled_norms(call.table, call.choice)
        update_running(setting.running, stats, samples, setting.momentum, moved)
    return out


def _drawn(call: EdgesCall, setting: Setting) -> Noise:
    """Returns what the skips draw; level and rng are made where they are not given."""
    noise, table, device = setting.noise, call.table, call.w.device
    if noise is None or not table.skips or not setting.training:
        return NO_NOISE
    _, _, level, rng = call.noise
    level = noise.level(device=device) if level is None else level
    return Noise([], noise.form, level, draw_noise(table.nodes, device) if rng is None else rng)


def _given(call: EdgesCall, setting: Setting) -> Tensor | None:
    """Returns the statistics to normalise by outside of training."""
    if setting.training:
        return None
    like = call.x[0]
    wide = accumulation_dtype(like.dtype)
    if setting.running:
        return stack_running(setting.running, wide)
    return like.new_empty(0, 2, like.shape[1], dtype=wide)


def _along_paths(call: EdgesCall, choice: Tensor, setting: Setting) -> Tensor:
    """Runs each path by itself, with the table, parameters and norms of that path."""
    taken = [call.table.path(row) for row in read_choice(choice, call.table)]
    for path in taken:  # before any of them runs, and moves statistics
        check_path(call, path, setting)
    out = []
    for path, (states, own, stream) in zip(taken, _by_path(call, len(taken))):
        # What no edge leaves gets no gradient, as in eager.
        x = [t if i in path.inputs else t.detach() for i, t in enumerate(states)]
        one = call._replace(
            x=x, w=own[list(path.edges), None], params=[call.params[i] for i in path.params],
            table=path.table, noise=call.noise._replace(rng=stream), choice=None,
        )  # fmt: skip
        running = setting.running
        if running is not None:
            running = [running[i] for i in path.norms]
        out.append(_run(one, setting._replace(running=running)))
    return out[0] if len(out) == 1 else torch.cat(out)


def _along_device_paths(call: EdgesCall, choice: Tensor, setting: Setting) -> Tensor:
    """Runs the kernels once for each path; they find its candidates in device memory."""
    # `unbind` gives views, and so the kernels read what the sampler wrote, at each replay of a
    # graph.
    rows = choice.reshape(-1, len(call.table.edges)).unbind()
    out = [
        _run(
            call._replace(x=list(states), w=own, noise=call.noise._replace(rng=stream), choice=row),
            setting,
        )
        for row, (states, own, stream) in zip(rows, _by_path(call, len(rows)))
    ]
    return out[0] if len(out) == 1 else torch.cat(out)


def _by_path(
    call: EdgesCall, paths: int
) -> Iterator[tuple[tuple[Tensor, ...], Tensor, Tensor | None]]:
    """Yields of each path its states, weights [edges] and streams [nodes, 2]."""
    rng = call.noise.rng
    # Paths lie one after the other in the batch of each state, [paths N, C, H, W].
    streams = [None] * paths if rng is None else rng.reshape(paths, -1, 2).unbind()
    states = zip(*(state.chunk(paths) for state in call.x))
    return zip(states, call.w.reshape(paths, -1).unbind(), streams)
