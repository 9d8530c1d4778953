"""Reads fastnas' own cells and mixed ops: what they were built as, where they still are that.

A cell knows the space that it was built for, so nothing has to be recognised. But any of its
modules may have been changed or exchanged since. Each candidate is compared with one of its name
that was just built; where the two differ in more than tensors, modes and settings of batch norms
that the fused ops ask for, the candidate is foreign: its own module runs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn

from fastnas import reference
from fastnas.layers import primitives
from fastnas.layers.nb201 import nb201_search_candidate
from fastnas.nn.facts import Facts, Outline, behaviour, has_own_forward, hooks
from fastnas.nn.parts import (
    Candidate,
    CellParts,
    MixedOpParts,
    Preprocess,
    candidate_modules,
    why_not_norm,
)
from fastnas.nn.reading import Reading
from fastnas.spaces.operations import EDGE_OPERATIONS, OPERATIONS

_OWN = tuple(vars(nn.Module()))
"""What torch keeps in every module; hooks and children are looked at apart."""
_FREE = {"training", "eps", "momentum", "track_running_stats"}
"""Settings that the fused ops take from the modules, or `why_not_norm` and modes refuse."""
_KINDS = (
    nn.ModuleList, nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d,
    nn.Identity, primitives.Identity, primitives.Zero, primitives.ReLUConvBN, primitives.DilConv,
    primitives.SepConv, primitives.FactorizedReduce,
)  # fmt: skip
KNOWN = tuple(map(behaviour, _KINDS))
"""Of the classes known to do what the structure of their modules says, as they were imported."""

Kinds = AbstractSet[type[nn.Module]]
_Read = list[Candidate | str]
"""Of each candidate what it is, or why it is foreign."""


@lru_cache(maxsize=1024)
def _new_candidate(name: str, C: int, stride: int) -> nn.Module:
    # It is built to be compared with. On the meta device it needs no memory, and initialising it
    # moves no generator.
    with torch.device("meta"):
        if name not in OPERATIONS:
            return nb201_search_candidate(name, C)
        return primitives.search_candidate(name, C, stride)


@lru_cache(maxsize=256)
def _new_preprocessing(C_in: int, C: int, halved: bool) -> nn.Module:
    with torch.device("meta"):
        return primitives.preprocessing(C_in, C, halved)


def _settings(module: nn.Module, like: nn.Module) -> dict[str, Any]:
    """Returns those settings that a module like it has, or that stand in place of its class's.

    No forward of a known class reads any other, such as the marks that libraries leave.
    """
    kind, known = type(like), vars(like)
    return {
        name: value
        for name, value in vars(module).items()
        if name not in _OWN and name not in _FREE and (name in known or hasattr(kind, name))
    }


def _differs(a: object, b: object) -> bool:
    try:
        return bool(a != b)
    except (RuntimeError, TypeError, ValueError):  # arrays have no one answer
        return True


def _is_there(tensors: dict[str, Any]) -> dict[str, bool]:
    return {name: tensor is not None for name, tensor in tensors.items()}


def _why_not_as_new(module: nn.Module, new: nn.Module, known: Kinds) -> str | None:
    """Says where a module differs from a new one, tensors and `_FREE` apart; None: nowhere.

    Args:
        known: the classes that nobody has patched.
    """
    given, expected = dict(module.named_modules()), dict(new.named_modules())
    if given.keys() != expected.keys():
        return f"{type(module).__name__} has other modules than it was built of"
    for name, part in given.items():
        like = expected[name]
        who = type(part).__name__ + (f" ({name})" if name else "")
        # A subclass, or a class whose forward was exchanged, may compute anything.
        if type(part) is not type(like) or type(part) not in known:
            return f"{who} is not the {type(like).__name__} that it was built as"
        if any(hooks(part)):
            return f"{who} has hooks"
        if has_own_forward(part):
            return f"{who} has a forward of its own instance"
        own, settings = _settings(part, like), _settings(like, like)
        names = {**settings, **own}
        changed = [n for n in names if _differs(own.get(n, _OWN), settings.get(n, _OWN))]
        if changed:
            return f"{who} has another {', '.join(sorted(changed))} than it was built with"
        for tensors in ("_parameters", "_buffers"):
            # Values are free, but a scale that was added, or a weight that pruning moved, is not.
            if _is_there(vars(part)[tensors]) != _is_there(vars(like)[tensors]):
                return f"{who} has other tensors than it was built with"
    return None


def _mode(module: nn.Module, ops: Iterable[reference.MixedOp]) -> bool:
    """Returns the mode that its batch norms have to be in: its own, or all of them are frozen.

    Where noise is drawn they may not be: a fused call has one mode, which decides on both.
    """
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    frozen = norms and not any(norm.training for norm in norms)
    return module.training and not (frozen and all(op.noise is None for op in ops))


def _why_not_norms(norms: tuple[nn.BatchNorm2d, ...], training: bool) -> str | None:
    for norm in norms:
        if norm.training != training:
            return "a batch norm is in another mode than the cell, or than another one"
        reason = why_not_norm(norm)
        if reason is not None:
            return reason
    return None


def _layers(
    module: nn.Module,
) -> tuple[tuple[nn.Conv2d, ...], tuple[nn.BatchNorm2d, ...]]:
    """Returns a module's convolutions and batch norms as it was built, in the order of the data."""
    parts = list(module.modules())
    convs = tuple(part for part in parts if isinstance(part, nn.Conv2d))
    return convs, tuple(part for part in parts if isinstance(part, nn.BatchNorm2d))


def _candidate(
    module: nn.Module, name: str | None, op: reference.MixedOp, training: bool, known: Kinds
) -> Candidate | str:
    if name is None or (not EDGE_OPERATIONS[name].kind(op.stride) and name != "none"):
        return f"{type(module).__name__} is no operation that mixed_edges knows"
    reason = _why_not_as_new(module, _new_candidate(name, op.channels, op.stride), known)
    if reason is not None:
        return reason
    convs, norms = _layers(module)
    return _why_not_norms(norms, training) or Candidate(name, op.stride, convs, norms)


def _read_op(op: reference.MixedOp, training: bool, known: Kinds) -> _Read:
    modules = candidate_modules(op)
    if len(modules) != len(op.names):
        return ["its number of candidates was changed"] * len(modules)
    named = zip(modules, op.names)
    return [_candidate(module, name, op, training, known) for module, name in named]


def _refuse_odd_norms(edges: list[_Read]) -> None:
    """Makes foreign, in place, what has batch norms unlike most, or one that is there already."""
    every = [norm for edge in edges for c in edge if not isinstance(c, str) for norm in c.norms]
    if not every:
        return
    # A call of `mixed_edges` has one eps and one momentum, so the most frequent pair stays fused.
    common = Counter((norm.eps, norm.momentum) for norm in every).most_common(1)[0][0]
    seen: set[nn.Module] = set()
    for edge in edges:
        for k, candidate in enumerate(edge):
            if isinstance(candidate, str):
                continue
            norms = candidate.norms
            if any((norm.eps, norm.momentum) != common for norm in norms):
                edge[k] = "its batch norms have another eps or momentum than most"
            # One call would update its statistics twice, in an order that nothing fixes.
            elif seen & {*norms}:
                edge[k] = "a batch norm is used more than once"
            seen |= {*norms}


def _parts_of(op: reference.MixedOp, read: _Read) -> MixedOpParts:
    candidates = tuple(None if isinstance(c, str) else c for c in read)
    foreign = {k: c for k, c in enumerate(read) if isinstance(c, str)}
    return MixedOpParts(candidates, foreign, op.stride)


def mixed_op_parts(op: Any, known: Kinds) -> MixedOpParts | str:
    """Reads the candidates of our mixed op, or says why they are computed one by one."""
    read = _read_op(op, _mode(op, [op]), known)
    _refuse_odd_norms([read])
    parts = _parts_of(op, read)
    return op.refusal(parts) or _why_not_partly(parts, [parts], [op]) or parts


def _why_not_partly(
    parts: MixedOpParts | CellParts, edges: Iterable[MixedOpParts], ops: Iterable[nn.Module]
) -> str | None:
    """Says why nothing is fused beside the foreign candidates, or None.

    A candidate that overwrites its input has to run after those before it, and before those after.
    """
    if not parts.layers.norms:
        return parts.why_foreign
    for e, (edge, op) in enumerate(zip(edges, ops)):
        for k in edge.foreign:
            leaves = (part for part in candidate_modules(op)[k].modules() if not part._modules)
            if getattr(next(leaves), "inplace", False):
                return f"edge {e}, candidate {k}: it overwrites its input"
    return None


def _preprocess(
    cell: Any, name: str, built_from: tuple[int, int, bool], training: bool, known: Kinds
) -> Preprocess | str:
    module = getattr(cell, name)
    reason = _why_not_as_new(module, _new_preprocessing(*built_from), known)
    if reason is not None:
        return f"{name}: {reason}"
    convs, norms = _layers(module)
    reason = _why_not_norms(norms, training)
    if reason is not None:
        return f"{name}: {reason}"
    return Preprocess("factorized_reduce" if len(convs) > 1 else "relu_conv_bn", convs, norms[0])


def cell_parts(cell: Any, known: Kinds) -> CellParts | str:
    """Reads the operations of our cell, or says why they are computed one by one."""
    training = _mode(cell, cell._ops)
    before = [
        _preprocess(cell, name, built_from, training, known)
        for name, built_from in cell.preprocessed
    ]
    for found in before:
        if isinstance(found, str):
            return found
    edges = [_read_op(op, training, known) for op in cell._ops]
    _refuse_odd_norms(edges)
    parts = tuple(map(_parts_of, cell._ops, edges))
    for e, (op, edge) in enumerate(zip(cell._ops, parts)):
        reason = op.refusal(edge) or op.why_not_in_a_cell()
        # A mode decides on noise and statistics, of which a fused call has one.
        if op.training != cell.training:
            reason = "it is in another mode than the cell"
        if reason is not None:
            return f"edge {e}: {reason}"
    # A source counts states, inputs first; a target counts the nodes after the inputs.
    ends = tuple((source, target - cell.inputs) for source, target in cell.ends)
    first, second = cast(list[Preprocess], before) or (None, None)
    whole = CellParts(first, second, parts, ends, cell.nodes, cell.inputs, cell.outputs)
    return _why_not_partly(whole, parts, cell._ops) or whole


def _outlines(module: nn.Module) -> Iterator[Outline]:
    """Yields the mixed ops of a cell, or the one, with their lists of candidates, and the cell."""
    ops: tuple[nn.Module, ...] = (module,)
    if isinstance(module, reference.Dag):
        ops = candidate_modules(module)
        yield Outline(module)
        yield Outline(cast(nn.Module, module._ops))
    for op in ops:
        yield Outline(op, ("training", "noise", "skips", "skip_drop_path"))
        yield Outline(cast(nn.Module, op._ops))


def read(module: nn.Module) -> tuple[CellParts | MixedOpParts | str, Facts]:
    """Reads a cell or mixed op of `fastnas.nn`: its parts, and the facts that they follow from.

    A candidate with a module of another class than fastnas builds is the user's own, and may change
    its attributes in every call: only that it is there is a fact.
    """
    kinds = {type(part) for part in module.modules()}
    # This is asked once for each class, of which the 600 modules of a cell have 14.
    known = {kind for kind in kinds if behaviour(kind) in KNOWN}
    found: CellParts | MixedOpParts | str
    if isinstance(module, reference.Dag):
        found = cell_parts(module, known)
    else:
        found = mixed_op_parts(module, known)
    outlines = list(_outlines(module))
    apart = {outline.module for outline in outlines}
    ops = (op for op in apart if isinstance(op, reference.MixedOp))
    for candidate in [candidate for op in ops for candidate in candidate_modules(op)]:
        parts = [*candidate.modules()]
        if not all(type(part) in known for part in parts):
            apart |= {*parts}
    return found, Facts((part for part in module.modules() if part not in apart), outlines)


class HasReading:
    """Gives a module of fastnas its `Reading` at the moment it is made, or copied.

    torch.compile cannot follow the making of one while it traces.
    """

    _reading: Reading[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__new__(cls)
        vars(made)["_reading"] = Reading(read)
        return made
