"""Runs modules without keeping what they compute: backward runs each a second time.

`torch.utils.checkpoint` does that: it keeps the inputs, and replays torch's random generators and
autocast. What it leaves to the module is done here (`Replay`): a second run finds the parameters,
the buffers and the modes of the first one, and changes no buffer of the module.

An `autograd.Function` of our own took the same time (transformer blocks 1.23 beside 1.22 of
eager's, MBConv 1.05 beside 1.04). But it computes the gradients of all
parameters where those of the logits alone are asked for, gives none to tensors that a module uses
without holding them, and has no second derivatives by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import is_
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

F = TypeVar("F", bound=Callable[..., Any])
LARGE = 1 << 16
"""Bytes of a buffer beyond which no copy is kept if it is left as it was.

Statistics of norms are smaller, masks and tables of positions larger. To tell whether it was left
so is to compare the values, for which the host waits on a GPU.
"""
_FUSED: set[Callable[..., Any]] = set()


def keeps_little(function: F) -> F:
    """Marks a forward, set on a module in a `functools.partial`, that needs no second run.

    The drop-in's candidates keep little for backward, and their outputs wait for one another. Run
    a second time, each would be computed by itself.
    """
    _FUSED.add(function)
    return function


def is_fused(module: nn.Module) -> bool:
    """Tells whether the forward of this very module is one that keeps little."""
    own = vars(module).get("forward")
    return isinstance(own, functools.partial) and own.func in _FUSED


def _version(t: Tensor) -> int:
    if is_lazy(t):
        return 0
    return 0 if t.is_inference() else t._version


class _Seen(NamedTuple):
    """Holds what the first run of a module found."""

    params: list[_Held]
    fixed: list[_Held]
    """Large buffers that it left as they were."""
    moved: dict[str, Tensor]
    """Copies of the other buffers, from before it changed them."""
    modes: list[tuple[nn.Module, bool]]


class _Held(NamedTuple):
    """Names a tensor that a module holds, and the version that it had."""

    holder: dict[str, Any]
    name: str
    path: str
    tensor: Tensor
    version: int

    def is_there(self) -> bool:
        return self.holder.get(self.name) is self.tensor


def _held(op: nn.Module, kind: str) -> Iterator[_Held]:
    """Yields the parameters or the buffers of a module, by every name that they have."""
    for prefix, module in op.named_modules(remove_duplicate=False):
        holder: dict[str, Any] = vars(module)[kind]
        for name, t in holder.items():
            if t is not None:
                yield _Held(holder, name, f"{prefix}.{name}".lstrip("."), t, _version(t))


class Replay:
    """Calls a module; from the second call on, on what the first one found.

    Running statistics move in the first call alone, and a module whose output depends on what it
    changes (the vectors of a spectral norm) computes the same again. Parameters are kept by
    identity, as `functional_call` exchanges them for a call. Other state, such as Python's
    attributes, is not kept.

    Args:
        op: the module.
        who: what an error calls it.

    Raises:
        RuntimeError: in a later call, where a parameter, or a large buffer that the first call only
            read, was changed in place since.
    """

    def __init__(self, op: nn.Module, who: str) -> None:
        self.op = op
        self.who = who
        self.seen: _Seen | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._first(args, kwargs) if self.seen is None else self._again(args, kwargs)

    def _first(self, args: Any, kwargs: Any) -> Any:
        op = self.op
        params, buffers = list(_held(op, "_parameters")), list(_held(op, "_buffers"))
        # Which buffers the call changes is known after it, when what they held is gone. Versions do
        # not tell it: torch's batch norm and `.data` move none.
        self._refuse_lazy(params)
        copies: dict[int, Tensor] = {}  # by buffer: one may have several names
        for b in buffers:
            if id(b.tensor) not in copies:
                copies[id(b.tensor)] = b.tensor.detach().clone()
        before = {b.path: copies[id(b.tensor)] for b in buffers}
        modes = [(module, module.training) for module in op.modules()]
        y = op(*args, **kwargs)
        made = {b.path for b in _held(op, "_buffers")} - before.keys()
        if made:
            raise RuntimeError(
                f"{self.who}: its forward has made the buffer {min(made)!r}, which a second run"
                ' would find; call the candidate once before, or use memory="lean"'
            )
        # An embedding with `max_norm` changes its own weights, each time to the same.
        params = [p._replace(version=_version(p.tensor)) for p in params]
        fixed = [
            b
            for b in buffers
            if b.tensor.nbytes > LARGE and b.is_there() and torch.equal(before[b.path], b.tensor)
        ]
        left = {b.path for b in fixed}
        moved = {path: copy for path, copy in before.items() if path not in left}
        self.seen = _Seen(params, fixed, moved, modes)
        return y

    def _refuse_lazy(self, params: list[_Held]) -> None:
        lazy = [p.path for p in params if is_lazy(p.tensor)]
        if lazy:
            raise RuntimeError(
                f"{self.who}: its parameter {lazy[0]!r} has no shape before the first call; call"
                ' the candidate once before, or use memory="lean"'
            )

    def _again(self, args: Any, kwargs: Any) -> Any:
        assert self.seen is not None
        params, fixed, moved, modes = self.seen
        for held in (*params, *fixed):
            if _version(held.tensor) != held.version:
                raise RuntimeError(
                    f"{self.who}: its tensor {held.path!r} was changed in place between forward and"
                    " backward, which runs it again; change it after backward, or keep what forward"
                    ' computes by memory="lean"'
                )
        with _restored(modes):
            if not (fixed or moved) and all(p.is_there() for p in params):
                return self.op(*args, **kwargs)
            # Backward may come twice (`retain_graph`), and finds the same again.
            kept = {**moved, **{b.path: b.tensor for b in fixed}}
            once = {id(buffer): buffer.clone() for buffer in kept.values()}
            copies = {path: once[id(buffer)] for path, buffer in kept.items()}
            tensors = {**{p.path: p.tensor for p in params}, **copies}
            return functional_call(self.op, tensors, args, kwargs)


@contextmanager
def _restored(modes: list[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Sets the modes of modules for a while."""
    now = [(module, module.training) for module, then in modes if module.training != then]
    try:
        for module, then in modes:
            if module.training != then:
                module.training = then
        yield
    finally:
        for module, mode in now:
            module.training = mode


def as_value(t: Any) -> Any:
    """Returns a plain tensor in place of one that waits to be computed; anything else as it is."""
    # A view is made by a call of torch, which computes what waits. Functions of autograd, which a
    # checkpoint and our kernels are, pass that by.
    is_other = isinstance(t, Tensor) and type(t) not in (Tensor, nn.Parameter)
    return t.view_as(t) if is_other else t


# `torch.compiler.disable` imports dynamo at once: a second, and modules of extras. This does so in
# the first call, as torch's checkpoint itself.
@torch._disable_dynamo(recursive=False)
def recomputed(
    after: Callable[..., Tensor],
    op: nn.Module,
    who: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *further: Any,
) -> Tensor:
    """Returns after(op(*args, **kwargs), *further), of which backward runs all of it again.

    torch.compile leaves it out of its graphs: it calls the module and code of ours, whose effects
    on buffers a graph would have twice.

    Args:
        after: reads nothing but its arguments, all of them tensors or constants.
        args, kwargs: tensors in tuples, lists and dicts get gradients as well.
    """
    leaves, structure = tree_flatten((args, dict(kwargs)))
    replay, count = Replay(op, who), len(further)

    def run(*values: Any) -> Tensor:
        if replay.seen is None and all(map(is_, values[count:], leaves)):
            # What the module puts into a list or dict of its arguments is the caller's.
            return after(replay(*args, **kwargs), *values[:count])
        own_args, own_kwargs = tree_unflatten(list(values[count:]), structure)
        return after(replay(*own_args, **own_kwargs), *values[:count])

    values = *further, *map(as_value, leaves)
    y: Tensor = checkpoint(run, *values, use_reentrant=False, preserve_rng_state=True)
    return y
