"""mixed_edges: schema, fake, autograd, public function, checks. The kernels are two steps down:

backends/native_edges.py -> csrc/cpu/mixed_edges.cpp (csrc/cpu/{depthwise,product,pool}.h)
                            csrc/cuda/mixed_edges.cu (its plan and tiles beside it)
backends/eager.py        -> reference/mixed_edges.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnas import reference
from fastnas.backends import BACKENDS, Held, accumulation_dtype
from fastnas.backends.layout import state_format
from fastnas.ops.checks import as_list
from fastnas.ops.device_choice import sampled_norms, stays_on_device
from fastnas.ops.dispatch import (
    choose_backend,
    is_plain_call,
    needs_graph,
    reference_grads,
    wants_graph_of_backward,
)
from fastnas.ops.edge_checks import check_call, check_choice, check_path, read_choice
from fastnas.ops.flops import count_as_eager
from fastnas.ops.mixed_sum import draw_rng
from fastnas.ops.running import Running, stack_running, update_running
from fastnas.reference import EdgeTable, SkipNoise

torch.library.define(
    "fastnas::mixed_edges_fwd",
    "(Tensor[] x, Tensor w, Tensor[] params, int[] table, Tensor? running, float eps, str form,"
    " Tensor? level, Tensor? rng, Tensor? choice, str memory, bool keep_gram, str? backend)"
    " -> (Tensor out, Tensor[] held)",
)
torch.library.define(
    "fastnas::mixed_edges_bwd",
    "(Tensor dout, Tensor[] x, Tensor out, Tensor w, Tensor[] params, Tensor[] held, int[] table,"
    " float eps, str form, Tensor? level, Tensor? rng, Tensor? choice, bool[] needs_dx,"
    " bool needs_dw, bool needs_dparams, str? backend)"
    " -> (Tensor[] dx, Tensor dw, Tensor[] dparams)",
)


def _backend(x: Tensor, backend: str | None) -> Any:  # not every backend has the op
    return BACKENDS[choose_backend("mixed_edges", x, backend)]


def _fwd(
    x: list[Tensor],
    w: Tensor,
    params: list[Tensor],
    table: Sequence[int],
    running: Tensor | None,
    eps: float,
    form: str,
    level: Tensor | None,
    rng: Tensor | None,
    choice: Tensor | None,
    memory: str,
    keep_gram: bool,
    backend: str | None,
) -> tuple[Tensor, list[Tensor]]:
    edges = EdgeTable.decode(table)
    out, held = _backend(x[0], backend).mixed_edges_fwd(
        x, w, params, edges, running, eps, form, level, rng, memory, keep_gram, **_given(choice)
    )
    return out, list(held)


def _given(choice: Tensor | None) -> dict[str, Tensor]:  # not every backend takes one
    return {} if choice is None else {"choice": choice}


def _bwd(
    dout: Tensor,
    x: list[Tensor],
    out: Tensor,
    w: Tensor,
    params: list[Tensor],
    held: list[Tensor],
    table: Sequence[int],
    eps: float,
    form: str,
    level: Tensor | None,
    rng: Tensor | None,
    choice: Tensor | None,
    needs_dx: list[bool],
    needs_dw: bool,
    needs_dparams: bool,
    backend: str | None,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    edges = EdgeTable.decode(table)
    return _backend(x[0], backend).mixed_edges_bwd(
        dout, x, out, w, params, Held(*held), edges, eps, form, level, rng,
        needs_dx, needs_dw, needs_dparams, **_given(choice),
    )  # fmt: skip


torch.library.impl("fastnas::mixed_edges_fwd", "default", _fwd)
torch.library.impl("fastnas::mixed_edges_bwd", "default", _bwd)
count_as_eager("mixed_edges", _fwd, _bwd)


@torch.library.register_fake("fastnas::mixed_edges_fwd")
def _fwd_fake(
    x: list[Tensor],
    w: Tensor,
    params: list[Tensor],
    table: Sequence[int],
    running: Tensor | None,
    eps: float,
    form: str,
    level: Tensor | None,
    rng: Tensor | None,
    choice: Tensor | None,
    memory: str,
    keep_gram: bool,
    *_: Any,
) -> tuple[Tensor, list[Tensor]]:
    edges = EdgeTable.decode(table)
    N, C, rows, cols = edges.node_size([t.shape for t in x])
    out = x[0].new_empty(N, edges.nodes * C, rows, cols)
    held = Held.empty(
        x[0], edges, (N, C, rows, cols), form, memory, keep_gram, running is None,
        sampled=choice is not None,
    )  # fmt: skip
    return out.contiguous(memory_format=state_format(x[0])), list(held)


@torch.library.register_fake("fastnas::mixed_edges_bwd")
def _bwd_fake(
    dout: Tensor, x: list[Tensor], out: Tensor, w: Tensor, params: list[Tensor], *rest: Any
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    *_, needs_dx, needs_dw, needs_dparams, _ = rest
    dx = [
        torch.empty_like(t, memory_format=state_format(t)) for t, need in zip(x, needs_dx) if need
    ]
    dw = w.new_empty(w.shape if needs_dw else (0,))
    return dx, dw, [p.new_empty(p.shape) for p in params] if needs_dparams else []


def _forward(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """`_fwd`, by torch's dispatcher where somebody watches it."""
    out, held = (_fwd if is_plain_call() else torch.ops.fastnas.mixed_edges_fwd)(*arguments)
    return out, held


def _reference(
    leaves: Sequence[Tensor],
    table: EdgeTable,
    stats: Tensor,
    eps: float,
    form: str,
    level: Tensor | None,
    rng: Tensor | None,
    choice: Tensor | None,
) -> Tensor:
    """`reference.mixed_edges` in training as a function of (w, x, params); `choice` is [edges]."""
    w, *tensors = leaves
    x, params = tensors[: table.inputs], tensors[table.inputs :]
    if choice is not None:
        path = table.path(choice.tolist())
        w, params = w[list(path.edges), None], [params[i] for i in path.params]
        table, stats = path.table, stats[list(path.norms)]
    return reference.mixed_edges(
        x, w, params, table, torch.empty_like(stats), eps=eps, form=form, level=level, rng=rng
    )


class _MixedEdges(torch.autograd.Function):
    """Saves states, which the network holds anyway, statistics, and what `memory` says."""

    @staticmethod
    def forward(
        ctx: Any,
        table: EdgeTable,
        running: Tensor | None,
        eps: float,
        form: str,
        level: Tensor | None,
        rng: Tensor | None,
        choice: Tensor | None,
        memory: str,
        backend: str | None,
        w: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x, params = list(tensors[: table.inputs]), list(tensors[table.inputs :])
        needs_dparams = any(ctx.needs_input_grad[10 + table.inputs :])
        out, held = _forward(
            x, w, params, table.code, running, eps, form, level, rng, choice, memory,
            needs_dparams, backend,
        )  # fmt: skip
        ctx.settings = table, eps, form, backend
        ctx.counts = len(params), len(held)
        ctx.save_for_backward(out, w, level, rng, choice, *x, *params, *held)
        ctx.mark_non_differentiable(held[0])
        return out, held[0]

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        table, eps, form, backend = ctx.settings
        out, w, level, rng, choice, *rest = ctx.saved_tensors
        inputs, params = table.inputs, ctx.counts[0]
        x, own, held = rest[:inputs], rest[inputs : inputs + params], rest[inputs + params :]
        if wants_graph_of_backward(dout):
            settings = table, Held(*held).stats, eps, form, level, rng, choice
            needs = ctx.needs_input_grad[9:]
            own_grads = reference_grads(
                lambda leaves: _reference(leaves, *settings), [w, *x, *own], needs, dout
            )
            return *[None] * 9, *own_grads
        needs_dw, needs_dx = ctx.needs_input_grad[9], list(ctx.needs_input_grad[10 : 10 + inputs])
        needs_dparams = any(ctx.needs_input_grad[10 + inputs :])
        bwd = _bwd if is_plain_call() else torch.ops.fastnas.mixed_edges_bwd
        dx, dw, dparams = bwd(
            dout, x, out, w, own, held, table.code, eps, form, level, rng, choice,
            needs_dx, needs_dw, needs_dparams, backend,
        )  # fmt: skip
        wanted = iter(dx)
        all_dx = [next(wanted) if need else None for need in needs_dx]
        return *[None] * 9, dw if needs_dw else None, *all_dx, *(dparams or [None] * params)


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
    """The nodes of a cell, y_j = sum_{e into j} sum_k w_ek o_k(x_e), straight from its states.

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
    (10 bits of fraction): in bfloat16, and in float32 where torch's switch for matmul,
    `torch.backends.cuda.matmul.fp32_precision`, is "tf32".

    With `choice` each edge runs the one candidate that was sampled for it:
    y_j = sum_{e into j, k_e >= 0} w_e o_{k_e}(x_e). What is not sampled is not computed: its
    parameters get no gradient (None), its running statistics stand still. Several paths share
    one call and nothing else: they give what a call for each, one after the other, gives.

    Args:
        x: the input states, [N, C, H, W] each, float32, bfloat16 or (not on CUDA) float64. None
            of C, H and W may be 0.
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
        training: whether the statistics are the batch's. Outside of it there is no gradient.
        eps: added to every variance, which is kept in float32 (float64): below 1e-38 it is 0.
        noise: on every skip (`SkipNoise`); None draws none.
        level: float64 [2] (`SkipNoise.level`); by default amplitude 1.
        rng: int64 [nodes, 2] (of several paths [paths, nodes, 2]), Philox key and offset; the j-th
            skip into a node adds j. By default drawn from torch's generator.
        memory: what is held for backward besides the states: "fast" the input of every second
            half and the last depthwise output of the 5x5 kernels, "lean" the former, "minimal"
            neither.
        backend: see `mixed_sum`.

    Returns:
        [N, nodes C, H', W'] (or [paths N, ...]), the nodes one after the other: channels last in
        memory on the CPU, NCHW on a GPU.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is allowed.
        BackendError: the explicit backend cannot run this.
    """
    x, params = as_list("mixed_edges", "x", x), as_list("mixed_edges", "params", params)
    if running is not None:
        running = as_list("mixed_edges", "running", running, "pairs of Tensors")
    if choice is not None:
        check_choice(x, w, params, table, choice, running, rng)
        settings = {"momentum": momentum, "training": training, "eps": eps, "noise": noise,
                    "level": level, "memory": memory, "backend": backend}  # fmt: skip
        along = _along_paths
        if stays_on_device() and getattr(_backend(x[0], backend), "takes_choice", False):
            along = _along_device_paths
        return along(x, w, params, table, choice, running, rng, settings)
    return _call(
        x, w, params, table, None, running, momentum, training, eps, noise, level, rng, memory,
        backend,
    )  # fmt: skip


def _call(
    x: list[Tensor],
    w: Tensor,
    params: list[Tensor],
    table: EdgeTable,
    choice: Tensor | None,
    running: list[Running] | None,
    momentum: float,
    training: bool,
    eps: float,
    noise: SkipNoise | None,
    level: Tensor | None,
    rng: Tensor | None,
    memory: str,
    backend: str | None,
) -> Tensor:
    """One path, or all candidates; `choice` [edges] stays on the device."""
    check_call(
        x, w, params, table, choice, running, training, momentum, eps, noise, level, rng, memory
    )
    form = "none"
    if noise is not None and table.skips and training:
        form = noise.form
        level = noise.level(device=w.device) if level is None else level
        rng = draw_rng(table.nodes, w.device) if rng is None else rng
    else:
        level = rng = None
    if not torch.compiler.is_compiling():
        backend = choose_backend("mixed_edges", x[0], backend)
    given = None
    if not training:
        wide = accumulation_dtype(x[0].dtype)
        given = (
            stack_running(running, wide)
            if running
            else x[0].new_empty(0, 2, x[0].shape[1], dtype=wide)
        )
    if needs_graph((w, *x, *params)):
        out, stats = _MixedEdges.apply(
            table, given, eps, form, level, rng, choice, memory, backend, w, *x, *params
        )
    else:
        out, held = _forward(
            x, w, params, table.code, given, eps, form, level, rng, choice, memory, False, backend
        )
        stats = Held(*held).stats
    if training and running is not None:
        samples = out.numel() // out.shape[1]
        moved = None if choice is None else sampled_norms(table, choice)
        update_running(running, stats, samples, momentum, moved)
    return out


def _along_paths(
    x: list[Tensor],
    w: Tensor,
    params: list[Tensor],
    table: EdgeTable,
    choice: Tensor,
    running: list[Running] | None,
    rng: Tensor | None,
    settings: dict[str, Any],
) -> Tensor:
    """A call of `mixed_edges` for each path, with the table, parameters and norms of that path."""
    taken = [table.path(row) for row in read_choice(choice, table)]
    for path in taken:  # before any of them runs, and moves statistics
        check_path(x, params, path, running, settings["training"])
    out = []
    for path, (states, own, stream) in zip(taken, _by_path(len(taken), x, w, rng)):
        out.append(
            mixed_edges(
                # What no edge leaves gets no gradient, as in eager.
                [t if i in path.inputs else t.detach() for i, t in enumerate(states)],
                own[list(path.edges), None],
                [params[i] for i in path.params],
                path.table,
                running=None if running is None else [running[i] for i in path.norms],
                rng=stream,
                **settings,
            )
        )
    return out[0] if len(out) == 1 else torch.cat(out)


def _along_device_paths(
    x: list[Tensor],
    w: Tensor,
    params: list[Tensor],
    table: EdgeTable,
    choice: Tensor,
    running: list[Running] | None,
    rng: Tensor | None,
    settings: dict[str, Any],
) -> Tensor:
    """A call of the kernels for each path, which find its candidates in device memory."""
    rows = choice.reshape(-1, len(table.edges)).unbind()
    out = [
        _call(list(states), own, params, table, row, running=running, rng=stream, **settings)
        for row, (states, own, stream) in zip(rows, _by_path(len(rows), x, w, rng))
    ]
    return out[0] if len(out) == 1 else torch.cat(out)


def _by_path(
    paths: int, x: list[Tensor], w: Tensor, rng: Tensor | None
) -> Iterator[tuple[tuple[Tensor, ...], Tensor, Tensor | None]]:
    """Of each path its states, weights [edges] and streams [nodes, 2]."""
    streams = [None] * paths if rng is None else rng.reshape(paths, -1, 2).unbind()
    return zip(zip(*(state.chunk(paths) for state in x)), w.reshape(paths, -1).unbind(), streams)
