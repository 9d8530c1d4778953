"""What `mixed_edges` checks before a kernel runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnas.backends import MEMORY
from fastnas.ops.checks import (
    check_image,
    check_noise_tensors,
    check_running,
    check_same,
    check_statistics,
    check_tensor,
)
from fastnas.ops.running import Running
from fastnas.reference import EdgeTable, SkipNoise


def check_call(
    x: list[Tensor],
    w: Tensor,
    params: list[Tensor],
    table: EdgeTable,
    running: Sequence[Running] | None,
    training: bool,
    eps: float,
    noise: SkipNoise | None,
    level: Tensor | None,
    rng: Tensor | None,
    memory: str,
) -> None:
    op = "mixed_edges"
    if memory not in MEMORY:
        raise ValueError(f"{op}: memory is {memory!r}; allowed: {', '.join(MEMORY)}")
    if not isinstance(table, EdgeTable):
        raise TypeError(f"{op}: table is a {type(table).__name__}; an EdgeTable is needed")
    if len(x) != table.inputs:
        raise ValueError(f"{op}: x has {len(x)} states; the table needs {table.inputs}")
    for i, state in enumerate(x):
        check_image(op, f"x[{i}]", state)
        check_same(op, f"x[{i}]", state, x[0])
        if state.shape[:2] != x[0].shape[:2]:
            raise ValueError(
                f"{op}: x[{i}] has shape {list(state.shape)}, x[0] {list(x[0].shape)}; N and C"
                " must be the same"
            )
    if not isinstance(w, Tensor) or not w.is_floating_point():
        raise TypeError(f"{op}: w is a {getattr(w, 'dtype', type(w).__name__)}; floating point is"
                        " needed")  # fmt: skip
    if w.shape != (len(table.edges), table.candidates):
        raise ValueError(
            f"{op}: w has shape {list(w.shape)}; [{len(table.edges)}, {table.candidates}] is"
            " needed, edges by candidates"
        )
    if w.device != x[0].device:
        raise ValueError(f"{op}: w is on {w.device}, x on {x[0].device}")
    _check_sizes(x, table)
    check_params(x[0], params, table)
    if running is not None and len(running) != table.norms:
        raise ValueError(f"{op}: running has {len(running)} norms; {table.norms} are needed")
    N, C, rows, cols = table.node_size([t.shape for t in x])
    check_running(op, running or (), C, training)
    has_running = running is not None or table.norms == 0
    # A table without batch norms has no statistics that one value could spoil.
    values = N * rows * cols if table.norms else 2
    check_statistics(op, training, has_running, values, eps, x[0], [*x, w, *params])
    check_noise_tensors(op, w.device, level, rng, rng_shape=(table.nodes, 2))
    if noise is None and (level is not None or rng is not None):
        raise ValueError(f"{op}: level or rng is given, but noise is None")


def _check_sizes(x: list[Tensor], table: EdgeTable) -> None:
    size = table.node_size([t.shape for t in x])
    for e, edge in enumerate(table.edges):
        if edge.source >= table.inputs:
            continue
        source = x[edge.source]
        here = (*source.shape[:2], *(-(-s // edge.stride) for s in source.shape[2:]))
        if here != size:
            raise ValueError(
                f"mixed_edges: edge {e} gives {list(here)} from x[{edge.source}] at stride"
                f" {edge.stride}, edge 0 gives {list(size)}; all nodes need one size"
            )


def check_params(
    x: Tensor, params: Sequence[Tensor], table: EdgeTable, names: Sequence[int] | None = None
) -> None:
    """One tensor for each parameter of the table; an error calls params[i] params[names[i]]."""
    C = x.shape[1]
    if C % 2 and any(term.op == "reduce_skip" for _, term in table.terms):
        raise ValueError(f"mixed_edges: a reduce_skip of {C} channels; an even number is needed")
    shapes = table.param_shapes(C)
    if len(params) != len(shapes):
        raise ValueError(f"mixed_edges: params has {len(params)} tensors; {len(shapes)} are needed")
    for i, p, shape in zip(names or range(len(params)), params, shapes):
        check_tensor("mixed_edges", f"params[{i}]", p)
        if tuple(p.shape) != shape:
            raise ValueError(
                f"mixed_edges: params[{i}] has shape {list(p.shape)}; {list(shape)} is needed"
            )
        check_same("mixed_edges", f"params[{i}]", p, x)


def check_choice(
    x: Sequence[Tensor],
    w: Tensor,
    params: Sequence[Tensor],
    table: EdgeTable,
    choice: Tensor,
    running: Sequence[Running] | None,
    rng: Tensor | None,
) -> list[list[int]]:
    """What `check_call` cannot see in the calls of single paths; the choices of each path."""
    op = "mixed_edges"
    if not isinstance(table, EdgeTable):
        raise TypeError(f"{op}: table is a {type(table).__name__}; an EdgeTable is needed")
    if len(x) != table.inputs:
        raise ValueError(f"{op}: x has {len(x)} states; the table needs {table.inputs}")
    edges = len(table.edges)
    if not isinstance(choice, Tensor) or choice.dtype != torch.int64:
        given = getattr(choice, "dtype", type(choice).__name__)
        raise TypeError(f"{op}: choice is {given}; an int64 Tensor is needed")
    if choice.dim() not in (1, 2) or choice.shape[-1] != edges or not choice.numel():
        raise ValueError(
            f"{op}: choice has shape {list(choice.shape)}; [{edges}] or [paths, {edges}] is needed"
        )
    if not isinstance(w, Tensor) or w.shape != choice.shape:
        given = list(w.shape) if isinstance(w, Tensor) else type(w).__name__
        raise ValueError(f"{op}: w has shape {given}; that of choice, {list(choice.shape)}, is"
                         " needed")  # fmt: skip
    paths = choice.shape[0] if choice.dim() == 2 else 1
    for i, state in enumerate(x):
        check_image(op, f"x[{i}]", state)
        if state.shape[0] % paths:
            raise ValueError(
                f"{op}: x[{i}] has {state.shape[0]} images; a multiple of the {paths} paths is"
                " needed"
            )
        if choice.device != state.device:
            raise ValueError(f"{op}: choice is on {choice.device}, x[{i}] on {state.device}")
    if len(params) != table.params:
        raise ValueError(f"{op}: params has {len(params)} tensors; {table.params} are needed")
    if running is not None and len(running) != table.norms:
        raise ValueError(f"{op}: running has {len(running)} norms; {table.norms} are needed")
    needed = (*choice.shape[:-1], table.nodes, 2)
    if rng is not None and rng.shape != needed:
        raise ValueError(f"{op}: rng has shape {list(rng.shape)}; {list(needed)} is needed")
    rows: list[list[int]] = choice.reshape(-1, edges).tolist()
    for row in rows:
        for e, k in enumerate(row):
            if not -1 <= k < table.candidates:
                raise ValueError(
                    f"{op}: choice of edge {e} is {k}; -1 to {table.candidates - 1} is allowed"
                )
    return rows
