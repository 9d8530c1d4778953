"""Reads whole cells of a foreign search network, laid out as in the public DARTS code."""

from __future__ import annotations

from typing import cast

from torch import nn

from fastnas.dropin.checked import OF_TORCH, is_setting
from fastnas.dropin.recognise import (
    Foreign,
    candidate,
    need,
    need_alike,
    or_reason,
    preprocess,
)
from fastnas.dropin.replacements import has_foreign_forward
from fastnas.nn.facts import hooks
from fastnas.nn.parts import CellParts, MixedOpParts, Preprocess, candidate_modules
from fastnas.spaces.darts import DARTS


@or_reason
def mixed_op_parts(module: nn.Module) -> MixedOpParts | str:
    """Reads the candidates of a mixed op (with a ModuleList `_ops`), or says why it is none."""
    ops = candidate_modules(module)
    need(bool(ops), f"{type(module).__name__} has no ModuleList `_ops` of candidates")
    read = [candidate(op) for op in ops]
    candidates = tuple(None if isinstance(c, str) else c for c in read)
    foreign = {k: c for k, c in enumerate(read) if isinstance(c, str)}
    # The stride of foreign candidates is unknown; the trial runs them.
    strides = {c.stride for c in candidates if c is not None}
    need(bool(strides), f"no candidate is of DARTS: {next(iter(foreign.values()), '')}")
    need(len(strides) <= 1, f"candidates differ in stride: {sorted(strides)}")
    parts = MixedOpParts(candidates, foreign, strides.pop())
    need_alike(parts.norms)
    return parts


def is_cell(module: nn.Module) -> bool:
    """Tells whether it has what a cell has: preprocess0, preprocess1, a ModuleList `_ops`."""
    named = {"preprocess0", "preprocess1"} <= set(module._modules)
    return named and isinstance(module._modules.get("_ops"), nn.ModuleList)


def _cell_preprocess(cell: nn.Module, name: str) -> Preprocess:
    read = preprocess(cast(nn.Module, getattr(cell, name)))
    if isinstance(read, str):
        raise Foreign(f"{name}: {read}")
    return read


def _need_plain_settings(who: str, module: nn.Module) -> None:
    """Refuses what a forward may read, and others may change, without a module being written to.

    Nothing is lost: the own forward runs, and its candidates fused.
    """
    need(not module._buffers, f"{who} has a buffer, which its forward may read")
    for name, value in vars(module).items():
        if name not in OF_TORCH:
            need(is_setting(value), f"{who} keeps a {type(value).__name__}, {name}")


def _cell_edge(e: int, module: nn.Module) -> MixedOpParts:
    need(not any(hooks(module)), f"edge {e} has hooks")
    need(not has_foreign_forward(module), f"edge {e} has a forward of its own instance")
    _need_plain_settings(f"edge {e}", module)
    edge = mixed_op_parts(module)
    if isinstance(edge, str):
        raise Foreign(f"edge {e}: {edge}")
    for k, reason in edge.foreign.items():
        raise Foreign(f"edge {e}, candidate {k}: {reason}")
    return edge


@or_reason
def cell_parts(cell: nn.Module) -> CellParts | str:
    """Reads a cell whose every operation is recognised, or says why it is not one.

    A reduction cell has stride 2 on the edges that leave its two inputs, and only there. Where
    the cell names its nodes `_steps` and the nodes of its output `_multiplier`, as the public
    code does, both must be the nodes that the edges make up: all of them are concatenated.
    """
    need(is_cell(cell), f"{type(cell).__name__} has no preprocess0, preprocess1 and `_ops`")
    _need_plain_settings("it", cell)
    modules = candidate_modules(cell)
    try:
        nodes = DARTS.nodes_of(len(modules), "its `_ops`")
    except ValueError as error:
        raise Foreign(str(error)) from error
    for name in ("_steps", "_multiplier"):
        given = getattr(cell, name, nodes)
        need(given == nodes, f"{name} is {given}; the {len(modules)} edges make {nodes} nodes")
    preprocess0 = _cell_preprocess(cell, "preprocess0")
    preprocess1 = _cell_preprocess(cell, "preprocess1")
    edges = tuple(_cell_edge(e, module) for e, module in enumerate(modules))
    counts = {len(edge.candidates) for edge in edges}
    need(len(counts) == 1, f"edges differ in their number of candidates: {sorted(counts)}")
    stride = edges[0].stride
    ends = tuple((source, target - DARTS.inputs) for source, target in DARTS.edges(nodes))
    for e, ((source, _), edge) in enumerate(zip(ends, edges)):
        # Nodes have the size of the cell's output, so edges between them keep it.
        needed = stride if source < DARTS.inputs else 1
        need(edge.stride == needed, f"edge {e} has stride {edge.stride}; {needed} is needed")
    parts = CellParts(preprocess0, preprocess1, edges, ends, nodes)
    need_alike(parts.norms)
    return parts
