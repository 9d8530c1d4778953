"""Holds the forwards that `accelerate` gives to candidates, and to the modules around them.

Each is called as `forward(module, settings, ...)` with the arguments of the module's own forward.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastnas.backends.transforms import is_transformed
from fastnas.dropin.deferred import DeferredSum
from fastnas.dropin.modes import (
    Modes,
    autocast_now,
    is_compiled,
    must_not_wait,
)
from fastnas.dropin.pending import Call, Manner
from fastnas.dropin.rehearsal import PlannedCall, Rehearsal, rehearsal_now
from fastnas.dropin.replacements import replacement
from fastnas.dropin.say import NotFused, say_once
from fastnas.dropin.sums import Sum
from fastnas.dropin.tally import Site
from fastnas.dropin.tape import NoPlan
from fastnas.dropin.waiting import layout_of, real
from fastnas.nn.facts import has_global_hooks, hooks
from fastnas.nn.parts import Candidate, Preprocess, Tensors, is_by_batch
from fastnas.nn.reading import Reading
from fastnas.nn.recompute import keeps_little
from fastnas.nn.run import How, preprocessed_state, why_not_state

_Input = Tensor | DeferredSum
_Source = Tensor | Sum


FEW_CHANNELS = 16
"""Up to these the second half of a separable convolution is computed again as fast as it is read.

A step of PC-DARTS (4 to 16 channels) took 0.99 of its time in "lean" and kept 1/9.3 in place of
1/6.4 of eager's bytes (benchmarks/NOTES.md).
"""


@dataclass
class Settings:
    """Holds the arguments of a candidate's replaced forward.

    Args:
        site: what its calls are counted as.
        memory, backend: of `accelerate`.
        reading: what the module consists of: `Candidate` or `Preprocess`.
        strict: whether to raise `NotFused` where the module's own forward would run.
    """

    site: Site
    memory: str | None
    backend: str | None
    reading: Reading[Any]
    strict: bool = False

    def __post_init__(self) -> None:
        self.last: weakref.ref[Call] | None = None
        """The call before, which statistics may still wait for."""

    def memory_of(self, device: torch.device, channels: int, is_dense: bool = False) -> str:
        """Returns what is kept for backward of a cell, or a candidate, of so many channels."""
        if self.memory is not None:
            return self.memory
        few = device.type == "cpu" and channels <= FEW_CHANNELS and not is_dense
        return "minimal" if few else "lean"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "last": None}


def _serve(
    module: nn.Module,
    settings: Settings,
    args: tuple[Any, ...],
    kwargs: Any,
    fused: Callable[[nn.Module, Settings, Any, _Input, Any], Any],
) -> Any:
    """Runs `fused` on what the module was read as, its input, and what a candidate reads of that.

    Where that cannot be, the module's own forward runs. So it does in compiled code: dynamo cannot
    follow sums that wait.
    """
    if is_compiled():
        return type(module).forward(module, *args, **kwargs)
    rehearsal = rehearsal_now()
    if rehearsal is not None:
        return _rehearsed(rehearsal, module, settings, args, kwargs)
    ready = _ready(module, settings, args, kwargs)
    if isinstance(ready, str):
        return _own(module, settings, args, kwargs, ready)
    return fused(module, settings, *ready)


def _rehearsed(
    rehearsal: Rehearsal, module: nn.Module, settings: Settings, args: Any, kwargs: Any
) -> DeferredSum:
    given, found = _input(module, args, kwargs), settings.reading.read(module)
    if not isinstance(found, Candidate) or isinstance(given, str):
        raise NoPlan(f"{type(module).__name__} is no candidate here")
    memory = settings.memory_of(rehearsal.device, given.shape[1], found.is_dense)
    manner = manner_of(found, settings, rehearsal.autocast, memory)
    return rehearsal.call(PlannedCall(module, settings, found, -1, manner), given)


@replacement
@keeps_little
def candidate_forward(module: nn.Module, settings: Settings, *args: Any, **kwargs: Any) -> Any:
    """Returns the candidate's output as a sum that is computed when it is used."""
    return _serve(module, settings, args, kwargs, _counted)


def _counted(
    module: nn.Module, settings: Settings, found: Candidate, given: _Input, x: _Source
) -> DeferredSum | Tensor:
    if not found.is_open:  # a pool counts once its batch norm comes
        settings.site.ran_fused()
    return _deferred(settings, found, given, x)


def manner_of(
    found: Candidate, settings: Settings, autocast: torch.dtype | None, memory: str
) -> Manner:
    """Returns how a candidate is computed as its batch norms are now."""
    # Without a norm nothing depends on the mode, and training is what has gradients.
    training = found.is_by_batch or not found.norms
    norm = found.norms[0] if found.norms else None
    eps = 1e-5 if norm is None else norm.eps
    # Outside of training nothing moves, and calls of any momentum share a kernel.
    momentum = cast(float, norm.momentum) if norm is not None and training else 0.0
    return Manner(training, autocast, eps, momentum, memory, settings.backend)


def candidate_call(
    settings: Settings,
    found: Candidate,
    tensors: Tensors,
    x: _Source,
    manner: Manner,
    modes: Modes,
) -> Call:
    """Returns a new call of a candidate that reads x."""
    before = None if settings.last is None else settings.last()
    if before is not None:
        before.settle(manner.training)
    call = Call(found, tensors, x, manner, settings.site, modes)
    settings.last = weakref.ref(call)
    return call


def _deferred(
    settings: Settings, found: Candidate, given: _Input, x: _Source
) -> DeferredSum | Tensor:
    modes = Modes.now()
    memory = settings.memory_of(x.device, x.shape[1], found.is_dense)
    manner = manner_of(found, settings, autocast_now(x.device), memory)
    call = candidate_call(settings, found, found.tensors(), x, manner, modes)
    # Sizes are rounded up, as convolutions and pools with this padding do.
    rows, cols = (-(-size // found.stride) for size in x.shape[2:])
    shape = torch.Size((*x.shape[:2], rows, cols))
    # The output of an identity is its input itself.
    base = (given, None) if call.is_skip and isinstance(given, DeferredSum) else None
    y = DeferredSum([Sum([(None, call)], (), shape, modes)], layout_of(given), base=base)
    if call.is_skip and base is None:
        y.is_input(given)
    return y.tensor() if must_not_wait(given.is_inference()) else y


@replacement
def norm_forward(module: nn.Module, settings: Settings, *args: Any, **kwargs: Any) -> Any:
    """Joins a batch norm to the pool before it; of anything else it is the module's own forward."""
    if rehearsal_now() is not None:
        raise NoPlan("a batch norm comes after its pool")
    call = args[0].single() if args and isinstance(args[0], DeferredSum) else None
    found = settings.reading.read(module)
    if call is None or not call.candidate.is_open or isinstance(found, str):
        return type(module).forward(module, *real(args), **real(kwargs))
    pool = call.candidate
    joined = replace(found, name=pool.name, stride=pool.stride)
    reason = why_not(joined, call.source, module, settings)
    if reason is not None:
        return _own(module, settings, args, kwargs, reason)
    call.site.ran_fused()
    return _deferred(settings, joined, args[0], call.source)


@replacement
def preprocess_forward(module: nn.Module, settings: Settings, *args: Any, **kwargs: Any) -> Any:
    """Computes the preprocessing of a cell's input, fused; its layout waits for who looks."""
    return _serve(module, settings, args, kwargs, _preprocessed)


def _preprocessed(
    module: nn.Module, settings: Settings, found: Preprocess, given: _Input, x: _Source
) -> DeferredSum | Tensor:
    how = How(module.training, backend=settings.backend)
    y = preprocessed_state(found, x if isinstance(x, Tensor) else x.computed(), how)
    deferred = DeferredSum.of(y, layout_of(given))
    return deferred.tensor() if must_not_wait(y.is_inference()) else deferred


def _ready(
    module: nn.Module, settings: Settings, args: tuple[Any, ...], kwargs: Any
) -> tuple[Candidate | Preprocess, _Input, _Source] | str:
    """Returns what a module was read as, its input and what is read of that; or why not."""
    given = _input(module, args, kwargs)
    if isinstance(given, str):
        return given
    found: Candidate | Preprocess | str = settings.reading.read(module)
    if isinstance(found, str):
        return found
    x = given.source() if isinstance(given, DeferredSum) else given
    return why_not(found, x, module, settings) or (found, given, x)


def _input(module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> _Input | str:
    """Returns x of a call, or says why it cannot be served."""
    if len(args) != 1 or kwargs:
        first = first_arguments(module, 1, args, kwargs)
        if isinstance(first, str):
            return first
        args = first
    x = args[0]
    return x if isinstance(x, Tensor | DeferredSum) else f"called with a {type(x).__name__}"


def first_arguments(
    module: nn.Module, count: int, args: tuple[Any, ...], kwargs: Any
) -> tuple[Any, ...] | str:
    """Returns the first arguments of a call whose others are at their defaults, or why not.

    A further argument without a default may be None: so it was when the forwards were compared.
    """
    signature = inspect.signature(type(module).forward)
    bound = signature.bind(module, *args, **kwargs).arguments
    names = list(bound)[1:]
    for name in names[count:]:
        value, default = bound[name], signature.parameters[name].default
        fused = None if default is inspect.Parameter.empty else default
        if not _equal(value, fused):
            return f"called with {name}={value!r:.40}; {fused!r:.40} is fused"
    if len(names) < count:
        return f"called with {len(names)} arguments; {count} are needed"
    return tuple(bound[name] for name in names[:count])


def _equal(value: Any, default: Any) -> bool:
    plain = isinstance(value, bool | int | float | str)
    return value is default or (plain and type(value) is type(default) and value == default)


def why_not(
    found: Candidate | Preprocess, source: _Source, module: nn.Module, settings: Settings
) -> str | None:
    """Says why the fused ops cannot serve a call on x, or None."""
    x = cast(Tensor, source)  # of a sum that waits as much is known as is asked for here
    if is_transformed():
        return "torch.func transforms it"
    weights = [conv._parameters["weight"] for conv in found.convs[:1]]
    channels = found.convs[0].in_channels if found.convs else None
    if x.dim() == 4 and channels not in (None, x.shape[1]):
        return f"x has {x.shape[1]} channels; {channels} are needed"
    stride = found.stride if isinstance(found, Candidate) else len(found.convs)
    op = "mixed_edges" if isinstance(found, Candidate) else "relu_conv_bn"
    training = any(map(is_by_batch, found.norms))
    return why_not_state(op, x, weights, stride, training, settings.backend)


def _own(module: nn.Module, settings: Settings, args: Any, kwargs: Any, reason: str) -> Any:
    if settings.strict:
        raise NotFused(reason)
    settings.site.ran_own(reason)
    say_once(type(module).__name__, reason)
    y = type(module).forward(module, *real(args), **real(kwargs))
    # Some code wants outputs of one type from all candidates; hooks want tensors.
    if any(hooks(module)) or has_global_hooks():
        return y
    plain = not isinstance(y, Tensor) or isinstance(y, DeferredSum) or y.dim() != 4
    if plain or must_not_wait(y.is_inference()):
        return y
    given = [part for part in tree_leaves((args, kwargs)) if isinstance(part, DeferredSum)]
    aliases = [part.note_alias(y) for part in given]
    return y if any(aliases) else DeferredSum.of(y, layout_of(y))
