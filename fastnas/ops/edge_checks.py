"""Checks what `mixed_edges` is called with, before a kernel runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastnas import checks
from fastnas.backends import MEMORY
from fastnas.backends.calls import EdgesCall
from fastnas.ops.batch_norm import Running
from fastnas.ops.checks import (
    all_fit,
    check_all_running,
    check_image,
    check_noise_kind,
    check_noise_tensors,
    check_norm_settings,
    check_running,
    check_same,
    check_statistics,
    check_tensor,
    check_weight,
    fits,
    settled,
)
from fastnas.reference import SkipNoise
from fastnas.spaces import EdgeTable
from fastnas.spaces.edge_table import Path

OP = "mixed_edges"


class Setting(NamedTuple):
    """Holds what the public function takes beside what kernels are called with."""

    running: list[Running] | None
    momentum: float
    training: bool
    noise: SkipNoise | None
    backend: str | None


def check_call(call: EdgesCall, setting: Setting) -> None:
    """Checks everything that a kernel relies on, for one path or for all candidates."""
    x, w, table, training = call.x, call.w, call.table, setting.training
    checks.check_choice(f"{OP}: memory", call.memory, MEMORY)
    check_norm_settings(OP, training, setting.momentum, call.eps)
    check_states(x, table)
    for i, state in enumerate(x):
        check_same(OP, f"x[{i}]", state, x[0])
        if state.shape[:2] != x[0].shape[:2]:
            raise ValueError(
                f"{OP}: x[{i}] has shape {list(state.shape)}, x[0] {list(x[0].shape)}; N and C"
                " must be the same"
            )
    check_tensor(OP, "w", w)
    if call.choice is None and w.shape != (len(table.edges), table.candidates):
        raise ValueError(
            f"{OP}: w has shape {list(w.shape)}; [{len(table.edges)}, {table.candidates}] is"
            " needed, edges by candidates"
        )
    check_weight(OP, w, x[0].device, "x")
    settled(_check_sizes)(table, tuple([tuple(state.shape) for state in x]))
    check_params(x[0], call.params, table)
    _check_statistics(call, setting)
    _check_noise(call, setting.noise)


def _check_statistics(call: EdgesCall, setting: Setting) -> None:
    x, norms, running, training = call.x, call.table.norms, setting.running, setting.training
    check_norm_count(running, norms)
    N, C, rows, cols = call.table.node_size([t.shape for t in x])
    check_all_running(OP, running or (), C, x[0].device, training)
    has_running = running is not None or norms == 0
    # Without batch norms a single value per channel is fine.
    values = N * rows * cols if norms else 2
    check_statistics(OP, training, has_running, values, x[0])


def _check_noise(call: EdgesCall, noise: SkipNoise | None) -> None:
    _, _, level, rng = call.noise
    check_noise_kind(OP, noise)
    check_noise_tensors(OP, call.w.device, level, rng, rng_shape=(call.table.nodes, 2))
    if noise is None and (level is not None or rng is not None):
        raise ValueError(f"{OP}: level or rng is given, but noise is None")


def check_states(x: Sequence[Tensor], table: EdgeTable) -> None:
    """Refuses anything but an image tensor for each input of the table."""
    if not isinstance(table, EdgeTable):
        raise TypeError(f"{OP}: table is a {type(table).__name__}; an EdgeTable is needed")
    if len(x) != table.inputs:
        raise ValueError(f"{OP}: x has {len(x)} states; the table needs {table.inputs}")
    for i, state in enumerate(x):
        check_image(OP, f"x[{i}]", state)


def check_norm_count(running: Sequence[Running] | None, norms: int) -> None:
    if running is not None and len(running) != norms:
        raise ValueError(f"{OP}: running has {len(running)} norms; {norms} are needed")


def _check_sizes(table: EdgeTable, shapes: tuple[tuple[int, ...], ...]) -> None:
    """Refuses states whose sizes would give nodes of different sizes."""
    size = table.node_size(shapes)
    for e, edge in enumerate(table.edges):
        if edge.source >= table.inputs:
            continue
        N, C, rows, cols = shapes[edge.source]
        # -(-a // b) rounds up, as convolutions and pools with this padding do.
        here = (N, C, -(-rows // edge.stride), -(-cols // edge.stride))
        if here != size:
            raise ValueError(
                f"{OP}: edge {e} gives {list(here)} from x[{edge.source}] at stride"
                f" {edge.stride}, edge 0 gives {list(size)}; all nodes need one size"
            )


def check_path(call: EdgesCall, path: Path, setting: Setting) -> None:
    """Checks the parameters and statistics that a path takes of the whole table's."""
    like, running = call.x[0], setting.running
    check_params(like, [call.params[i] for i in path.params], path.table, path.params)
    if running is not None:
        C, device = like.shape[1], like.device
        for i in path.norms:
            check_running(OP, f"running[{i}]", running[i], C, device, setting.training)


def check_params(
    x: Tensor, params: Sequence[Tensor], table: EdgeTable, names: Sequence[int] | None = None
) -> None:
    """Checks the parameters of a table; an error calls params[i] params[names[i]]."""
    shapes = settled(_param_shapes)(table, x.shape[1])
    if len(params) != len(shapes):
        raise ValueError(f"{OP}: params has {len(params)} tensors; {len(shapes)} are needed")
    if all_fit(params, shapes, x):
        return
    for i, (p, shape) in enumerate(zip(params, shapes)):
        if not fits(p, shape, x):
            _refuse_param(f"params[{i if names is None else names[i]}]", p, shape, x)


def _param_shapes(table: EdgeTable, C: int) -> list[tuple[int, ...]]:
    if C % 2 and any(term.op == "reduce_skip" for _, term in table.terms):
        raise ValueError(f"{OP}: a reduce_skip of {C} channels; an even number is needed")
    return table.param_shapes(C)


def _refuse_param(name: str, p: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    check_tensor(OP, name, p)
    if p.shape != shape:
        raise ValueError(f"{OP}: {name} has shape {list(p.shape)}; {list(shape)} is needed")
    check_same(OP, name, p, x)


def check_choice(call: EdgesCall, choice: Tensor, running: Sequence[Running] | None) -> None:
    """Checks what `check_call` cannot see in the calls of single paths."""
    x, w, table, params, rng = call.x, call.w, call.table, call.params, call.noise.rng
    check_states(x, table)
    edges = len(table.edges)
    check_tensor(OP, "choice", choice)
    if choice.dtype != torch.int64:
        raise TypeError(f"{OP}: choice is {choice.dtype}; an int64 Tensor is needed")
    if choice.dim() not in (1, 2) or choice.shape[-1] != edges or not choice.numel():
        raise ValueError(
            f"{OP}: choice has shape {list(choice.shape)}; [{edges}] or [paths, {edges}] is needed"
        )
    check_tensor(OP, "w", w)
    if w.shape != choice.shape:
        raise ValueError(f"{OP}: w has shape {list(w.shape)}; that of choice,"
                         f" {list(choice.shape)}, is needed")  # fmt: skip
    paths = choice.shape[0] if choice.dim() == 2 else 1
    for i, state in enumerate(x):
        if state.shape[0] % paths:
            raise ValueError(
                f"{OP}: x[{i}] has {state.shape[0]} images; a multiple of the {paths} paths is"
                " needed"
            )
        if choice.device != state.device:
            raise ValueError(f"{OP}: choice is on {choice.device}, x[{i}] on {state.device}")
    if len(params) != table.params:
        raise ValueError(f"{OP}: params has {len(params)} tensors; {table.params} are needed")
    check_norm_count(running, table.norms)
    if rng is not None:
        # This comes before paths take rows of it: a wrong shape could still be cut into right ones.
        needed = (*choice.shape[:-1], table.nodes, 2)
        check_noise_tensors(OP, choice.device, None, rng, needed)


def read_choice(choice: Tensor, table: EdgeTable) -> list[list[int]]:
    """Reads the candidate of each edge, path by path; waits for the device."""
    rows: list[list[int]] = choice.reshape(-1, len(table.edges)).tolist()
    for row in rows:
        for e, k in enumerate(row):
            if not -1 <= k < table.candidates:
                raise ValueError(
                    f"{OP}: choice of edge {e} is {k}; -1 to {table.candidates - 1} is allowed"
                )
    return rows
