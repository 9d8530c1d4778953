"""Does at once what a module does with its candidates, where one call of it has told what that is.

By itself a mixed op of eight candidates makes 25 calls in Python, each of which returns a sum that
waits: 140 us a candidate, more than the kernels take in a small network. What a module does with
its candidates follows from its code, from what it consists of, and from the arguments, but for
their values. So its forward is run once without values (`rehearsal`); from then on the calls and
the sums that it made are made directly, as long as all that it follows from is the same.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastnas.backends.transforms import is_transformed
from fastnas.dropin.candidates import candidate_call, candidate_forward, why_not
from fastnas.dropin.deferred import DeferredSum
from fastnas.dropin.modes import Modes, autocast_now, changed, must_not_wait, version
from fastnas.dropin.pending import Call
from fastnas.dropin.purity import Constants, Impure
from fastnas.dropin.rehearsal import Origin, Program, Rehearsal
from fastnas.dropin.replacements import is_replaced
from fastnas.dropin.sums import Sum, Watched, watch
from fastnas.dropin.tape import Entry, NoPlan, played
from fastnas.dropin.waiting import Waiting, layout_of, real
from fastnas.dropin.weights import Element
from fastnas.nn.facts import Facts, has_global_hooks, has_own_forward, hooks
from fastnas.nn.parts import Tensors

logger = logging.getLogger("fastnas")
MOST = 8
"""How many programs are kept, and how many calls in a row may be in vain: then a module is left."""


class _Zeros(NamedTuple):
    """Holds programs by which weights are 0; by nothing where the forward does not look."""

    looks: bool
    programs: dict[Hashable, Program | None]


@dataclass
class _Seen:
    """Holds what a module was when its forward was run, and what it did then, by its arguments."""

    facts: Facts
    constants: Constants
    programs: dict[Hashable, _Zeros] = field(default_factory=dict)
    looked_up: tuple[Program, list[int], list[Tensors]] | None = None
    """The tensors of the calls of a program, and the versions of the dicts that hold them."""

    def holds(self) -> bool:
        return self.facts.hold() and self.constants.unchanged()

    def tensors(self, program: Program) -> list[Tensors]:
        """Returns what the candidates of a program compute with, in its order.

        Looked up again once a module was written to, as `functional_call` does.
        """
        now = self.facts.versions
        known = self.looked_up
        if known is None or known[0] is not program or known[1] is not now:
            known = program, now, [call.candidate.tensors() for call in program.calls]
            self.looked_up = known
        return known[2]


class Plans:
    """Keeps what a module does with its candidates; copies and pickles come without."""

    def __init__(self) -> None:
        self.seen: dict[bool, _Seen] = {}
        """By mode, as a search changes between the two."""
        self.left = MOST
        """How many more calls may be in vain; 0 once the module is left to its own forward."""

    def __deepcopy__(self, _: object) -> Plans:
        return Plans()

    def __reduce__(self) -> tuple[type[Plans], tuple[()]]:
        return Plans, ()

    def output(self, module: nn.Module, args: Sequence[Any], kwargs: Any) -> DeferredSum | None:
        """Returns what the module's own forward returns, or None where that has to run."""
        if self.left <= 0 or has_global_hooks():
            return None
        values = [*args, *kwargs.values()]
        described = None if is_transformed() or _is_watched() else _described(values)
        images = [v for v in values if isinstance(v, Tensor) and v.dim() == 4]
        if described is None or not images:
            return None
        seen = self._look(module)
        if seen is None:
            return None
        own = _described(seen.constants.tensors())
        if own is None:
            return None
        key = len(args), tuple(kwargs), autocast_now(images[0].device), described, own
        program = self._program(seen, key, module, args, kwargs)
        return None if program is None else _run(program, seen.tensors(program), values)

    def _look(self, module: nn.Module) -> _Seen | None:
        """Returns what was seen of the module, if it still is that; else looks at it."""
        seen = self.seen.get(module.training)
        if seen is not None and seen.holds():
            return seen
        self.left -= 1
        candidates = [
            part
            for part in module.modules()
            if is_replaced(part) and vars(part)["forward"].func is candidate_forward
        ]
        inside = {part for candidate in candidates for part in candidate.modules()}
        others = [part for part in module.modules() if part not in inside]
        try:
            hooked = any(any(hooks(part)) for part in module.modules() if part is not module)
            if hooked or any(map(has_own_forward, others[1:])):
                raise Impure("one of its modules has hooks, or a forward of its own")
            constants = Constants(others, inside)
        except Impure as reason:
            logger.debug("fastnas: %s runs its own forward: %s", type(module).__name__, reason)
            self.left = 0
            return None
        made = self.seen[module.training] = _Seen(Facts(module.modules()), constants)
        return made

    def _program(
        self,
        seen: _Seen,
        key: Hashable,
        module: nn.Module,
        args: Sequence[Any],
        kwargs: Any,
    ) -> Program | None:
        """Returns what the forward does with such arguments, known or found out now."""
        known = seen.programs.get(key)
        zeros: Hashable = None
        if known is not None and known.looks:
            zeros = _zeros([*args, *kwargs.values()])
        if known is not None and zeros in known.programs:
            program = known.programs[zeros]
            self.left = self.left - 1 if program is None else MOST
            return program
        self.left -= 1
        rehearsal = Rehearsal(args, kwargs, seen.constants.own)
        try:
            program = rehearsal.run(module)
        except NoPlan as reason:
            logger.debug("fastnas: %s runs its own forward: %s", type(module).__name__, reason)
            program = None
        if seen.constants.restored() or not seen.facts.hold():
            program = None  # it keeps something, which the next call may find
        if known is None:
            known = _Zeros(rehearsal.tape.looked_at_zeros, {})
            _put(seen.programs, key, known)
            zeros = _zeros([*args, *kwargs.values()]) if known.looks else None
        _put(known.programs, zeros, program)
        return program


V = TypeVar("V")


def _put(kept: dict[Hashable, V], key: Hashable, value: V) -> None:
    """Keeps a value, in place of the oldest where there are many."""
    if len(kept) >= MOST:
        del kept[next(iter(kept))]
    kept[key] = value


def _is_watched() -> bool:
    """Tells whether a mode of torch sees each operation, or stands in for it."""
    # Every tensor is made under the mode of `torch.set_default_device`, if there is one.
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack())


def _described(values: Sequence[Any]) -> Hashable | None:
    """Returns all of arguments but the values of their tensors; None for what has more to it."""
    found: list[Hashable] = []
    places: dict[int, int] = {}
    for v in values:
        kind = type(v)
        if isinstance(v, Waiting):
            if not v._stays():
                return None
        elif kind is Tensor or kind is nn.Parameter:
            if vars(v):  # a forward may ask for attributes that somebody gave it
                return None
        elif v is None or kind in (bool, int, float, str):
            found.append((kind, v))
            continue
        else:
            return None
        # Which arguments are the same may be asked, too.
        place = places.setdefault(id(v), len(places))
        if v.dim() == 4:
            if must_not_wait(v.is_inference()):
                return None
            found.append((place, kind, v.shape, v.dtype, v.device, layout_of(v)))
        else:
            if not v.is_contiguous():
                return None
            found.append((place, kind, v.shape, v.dtype, v.device))
    return tuple(found)


def _zeros(values: Sequence[Any]) -> Hashable:
    """Returns which of the mixing weights are 0."""
    weights = [v for v in values if isinstance(v, Tensor) and v.dim() != 4]
    return tuple(tuple((w.detach() == 0).flatten().tolist()) for w in weights)


def _run(program: Program, tensors: Sequence[Tensors], values: Sequence[Any]) -> DeferredSum | None:
    """Makes the calls and the sums of a program; None where the fused ops cannot serve them."""
    given = {origin: _part(values[origin.argument], origin) for origin in program.origins}
    sources = {
        origin: part.source() if isinstance(part, Waiting) else part
        for origin, part in given.items()
        if origin in program.read
    }
    for call in program.checked:
        assert isinstance(call.source, Origin)
        source = sources[call.source]
        if why_not(call.candidate, source, call.module, call.settings) is not None:
            return None
    modes, vectors = Modes.now(), played(program.vectors, values)
    calls: list[Call] = []
    sums: dict[int, Sum] = {}

    def node(i: int) -> Sum:
        if i not in sums:
            planned = program.sums[i]
            terms = [
                (Element(vectors[w.vector], w.place) if isinstance(w, Entry) else w, calls[k])
                for w, k in planned.terms
            ]
            watched: Watched = tuple(one for i in planned.weights for one in watch(vectors[i]))
            sums[i] = Sum(terms, (), planned.size, modes, watched)
            sums[i].is_new, sums[i].readers = planned.is_new, program.readers[i]
        return sums[i]

    for call, own in zip(program.calls, tensors):
        if isinstance(call.source, Origin):
            read = sources[call.source]
            if call.candidate.name == "skip_connect":
                _mark_used(given[call.source])
        else:
            read = node(call.source)
            read.is_node = True
        if not call.candidate.is_open:  # a pool counts once no batch norm has come
            call.settings.site.ran_fused()
        calls.append(candidate_call(call.settings, call.candidate, own, read, call.manner, modes))
    blocks = [
        node(block) if isinstance(block, int) else _block(given[block]) for block in program.blocks
    ]
    return DeferredSum(blocks, program.layout, program.moves, program.like)


def _part(value: Tensor, origin: Origin) -> Tensor:
    channels = origin.channels
    part: Tensor = value
    if channels is not None:
        part = value.part(channels) if isinstance(value, DeferredSum) else channels.of(value)
    if origin.applied is None:
        return part
    # The mixed ops that leave one state apply the same function to the same channels, once for all.
    made = part.as_block().made if isinstance(part, Waiting) else {}
    key = origin.applied, torch.is_grad_enabled()
    if key not in made:
        function, args, kwargs = origin.applied
        y: Tensor = function(real(part), *args, **dict(kwargs))
        made[key] = y, version(y)
    y, before = made[key]
    if version(y) != before:
        raise RuntimeError(changed(f"an output of {origin.applied.function.__name__}"))
    return y


def _block(part: Tensor) -> Sum:
    """Returns an argument, or a part of one, as what a concatenation is made of."""
    if not isinstance(part, Waiting):
        return Sum.of(part)
    _mark_used(part)
    return part.as_block()


def _mark_used(part: Tensor) -> None:
    if isinstance(part, Waiting):
        part._mark_used(True)
