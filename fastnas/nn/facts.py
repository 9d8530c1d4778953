"""Tells whether modules still are what they were read as: classes, settings, children, hooks.

A module is read once. All of it may be changed later without a word to us, so that every call
first compares the modules with the facts that they were read from.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, repeat
from operator import is_
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._dynamo.guards import dict_version
from torch.nn.modules.module import _has_any_global_hook

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_TENSORS = ("_parameters", "_buffers")
_CONTENTS = (*_OF_TENSORS, "_modules", *HOOKS)
"""Dicts of a module that change in place."""
_TENSOR_OR_NONE = {Tensor, nn.Parameter, type(None)}
_CALLED = frozenset(("forward", "_call_impl", "_conv_forward", "_check_input_dim"))
"""What a call of one of torch's modules runs, and may be set on it in place of its class's."""
_CALL = nn.Module.__call__, nn.Module._call_impl


def hooks(module: nn.Module) -> tuple[Mapping[int, object], ...]:
    """Returns the hooks that a call of this very module runs, and a fused call would not."""
    own = vars(module)
    return tuple(own[name] for name in HOOKS)


def has_global_hooks() -> bool:
    """Tells whether every call of any module runs more: hooks, or another `__call__`."""
    # torch.fx, among others, exchanges `__call__` of all modules while it traces.
    patched = (nn.Module.__call__, nn.Module._call_impl) != _CALL
    return patched or bool(_has_any_global_hook())


def has_own_forward(module: nn.Module) -> bool:
    """Tells whether a forward, or what it is called by or calls, is set on the very module."""
    return not _CALLED.isdisjoint(vars(module))


def behaviour(kind: type[nn.Module]) -> tuple[object, ...]:
    """Returns the functions that a call of such a module may run: equal while none is patched."""
    bases = map(vars, _own_bases(kind))
    own = (value for base in bases for value in _own_functions(base).values())
    return kind.__call__, *(getattr(kind, name, None) for name in sorted(_CALLED)), *own


def _own_bases(kind: type[nn.Module]) -> list[type]:
    """Returns the classes that it consists of, but for torch's."""
    return [base for base in kind.__mro__ if not base.__module__.startswith("torch.")]


def _own_functions(own: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the methods, properties and plain values among what a class has."""
    kinds = (property, bool, int, float, str)
    return {
        name: value
        for name, value in own.items()
        if not name.startswith("__") and (callable(value) or isinstance(value, kinds))
    }


def is_plain(module: nn.Module) -> bool:
    """Tells whether a call of the module does nothing but run the forward of its class."""
    return not (has_own_forward(module) or any(hooks(module)) or has_global_hooks())


class Outline(NamedTuple):
    """Names a module of which only children, hooks, attributes' names and settings are watched."""

    module: nn.Module
    settings: tuple[str, ...] = ("training",)


PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))
_NEVER_CHANGE = (*PLAIN, torch.device, torch.Size, slice, range, MethodType)


def is_same(now: object, then: object) -> bool:
    """Tells whether a value is the one that it was, or one that cannot be told from it.

    What can change is the same only if it is that very object: an equal one would not be watched.
    """
    if now is then:
        return True
    kind = type(now)
    if kind is not type(then):  # True equals 1, and chooses other elements
        return False
    if isinstance(now, tuple) and isinstance(then, tuple):
        return len(now) == len(then) and all(map(is_same, now, then))
    # 0. equals -0., by which others divide.
    return kind in _NEVER_CHANGE and now == then and bool(now or repr(now) == repr(then))


def are_same(now: Sequence[object], then: Sequence[object]) -> bool:
    """Tells so of each of many values, nearly all of which are the very objects."""
    return len(now) == len(then) and (all(map(is_, now, then)) or all(map(is_same, now, then)))


class Facts:
    """Keeps all that torch and its class hold in each of some modules, when this is made.

    Values and identity of parameters and buffers are no facts: they change in every step, and
    `functional_call` exchanges them for a call. Only whether a tensor is there is one.

    Every call of a cell asks some 600 modules whether they are what they were. So facts of one
    kind stand in one list, compared in one loop that enters no Python code. The dicts of modules
    hold 12,000 values, which are compared only where Python says that a dict was written to; the
    many that are empty (a module has four of hooks) are only asked whether they still are.

    Args:
        modules: watched whole: class and its functions, every attribute, children, hooks.
        outlines: watched but for attributes that are no settings of theirs.
    """

    def __init__(self, modules: Iterable[nn.Module], outlines: Iterable[Outline] = ()) -> None:
        whole, asked = list(modules), list(outlines)
        outlined = [outline.module for outline in asked]
        self.modules = [*whole, *outlined]
        self.kinds = [type(module) for module in self.modules]
        self.owns, self.outer = [vars(m) for m in whole], [vars(m) for m in outlined]
        owns = [*self.owns, *self.outer]
        self.places = dicts = [(own, name) for own in owns for name in _CONTENTS]
        self.contents = [own[name] for own, name in dicts]
        self.empty = [own[name] for own, name in dicts if not own[name]]
        self.filled = [(o, n) for o, n in dicts if o[n] and n not in _OF_TENSORS]
        self.of_tensors = [(o, n) for o, n in dicts if o[n] and n in _OF_TENSORS]
        # Functions belong to classes, of which there are few; a patched class changes all its
        # modules.
        self.functions = _Functions(set(self.kinds))
        self.then = self._attributes(), [dict(o[n]) for o, n in self.filled], self._tensors()
        self.settings = [(own, name) for own, o in zip(self.outer, asked) for name in o.settings]
        self.outlines = self._outlines()
        self.written = [*owns, *(own[name] for own, name in [*self.filled, *self.of_tensors])]
        self.versions = self._versions()

    def _versions(self) -> list[int]:
        """Returns a number for each dict that is another one once somebody has written to it."""
        return list(map(dict_version, self.written))

    def _attributes(self) -> tuple[list[int], list[Any]]:
        """Counts what each module has, with all values: no name changes where both stay."""
        values = chain.from_iterable(map(dict.values, self.owns))
        return list(map(len, self.owns)), list(values)

    def _attributes_hold(self, counts: list[int], values: list[Any]) -> bool:
        now_counts, now = self._attributes()
        return now_counts == counts and are_same(now, values)

    def _tensors(self) -> tuple[list[str], list[bool], bool]:
        """Returns the names of tensors, which are None, and whether the others are Tensors."""
        held = [own[name] for own, name in self.of_tensors]
        values = list(chain.from_iterable(map(dict.values, held)))
        known = _TENSOR_OR_NONE.issuperset(map(type, values))
        known = known or all(v is None or isinstance(v, Tensor) for v in values)
        return list(chain.from_iterable(held)), list(map(is_, values, repeat(None))), known

    def _outlines(self) -> tuple[list[Any], list[frozenset[str]]]:
        """Returns settings of the outlines, and names of all their attributes, methods included."""
        return [own[name] for own, name in self.settings], list(map(frozenset, self.outer))

    def hold(self) -> bool:
        """Tells whether nothing has changed."""
        if any(self.empty) or list(map(type, self.modules)) != self.kinds:
            return False
        if not self.functions.hold():
            return False
        versions = self._versions()
        if versions == self.versions:
            return True
        # A write need not change a fact: `functional_call` exchanges tensors, and an attribute may
        # be set to what it was. From here on its dict is held to the version that it has now.
        if not self._contents_hold():
            return False
        self.versions = versions
        return True

    def _contents_hold(self) -> bool:
        """Tells whether the dicts of the modules hold what they held."""
        attributes, filled, tensors = self.then
        try:
            return (
                # Nobody would see what is written to a dict that took another one's place.
                all(map(is_, self.contents, [own[name] for own, name in self.places]))
                and self._attributes_hold(*attributes)
                and all(
                    # In this order they run, too.
                    list(then) == list(own[name])
                    and are_same(list(own[name].values()), list(then.values()))
                    for then, (own, name) in zip(filled, self.filled)
                )
                and self._tensors() == tensors
                and self._outlines() == self.outlines
            )
        # This is where a dict is gone, or an attribute is another array, for which == has no one
        # answer.
        except (KeyError, RuntimeError, ValueError):
            return False


class _Functions:
    """Keeps the functions that a call of a module of some classes may run (`behaviour`)."""

    def __init__(self, kinds: Iterable[type[nn.Module]]) -> None:
        called = [(kind, name) for kind in kinds for name in ("__call__", *_CALLED)]
        self.kinds, self.names = [kind for kind, _ in called], [name for _, name in called]
        self.bases = [vars(base) for kind in kinds for base in _own_bases(kind)]
        self.own = [(own, name) for own in self.bases for name in _own_functions(own)]
        self.then = self._now()

    def _now(self) -> tuple[list[Any], list[Any], list[int]]:
        """Returns functions and sizes: one that is new to its class stands in no list of names."""
        # `getattr` and not `vars`: a function may be exchanged on any of the bases.
        called = list(map(getattr, self.kinds, self.names, repeat(None)))
        return called, [own.get(name) for own, name in self.own], list(map(len, self.bases))

    def hold(self) -> bool:
        return self._now() == self.then


def guard_compiled(facts: Facts) -> None:
    """Lets the code that torch.compile is tracing run only while the facts hold.

    The guards that torch makes by itself are of what was traced: nobody reads the bias that a
    convolution does not have, and of hooks there are none at all. This one guard also takes the
    place of some 1,500 for each cell, which double the time of compiling.

    Args:
        facts: kept by the caller; once they are gone, the code is not run again.
    """
    from torch._dynamo.source import GlobalStateSource
    from torch._guards import Guard, TracingContext

    context = TracingContext.try_get()
    if context is None:
        return
    known = weakref.ref(facts)  # compiled code outlives the network that it was compiled for

    def holds(_: object) -> bool:
        then = known()
        return then is not None and not has_global_hooks() and then.hold()

    def create(builder: Any, guard: Guard) -> None:
        root, says = builder.guard_manager.root, ["the modules are as fastnas read them"]
        try:
            root.add_lambda_guard(holds, says, guard.user_stack)
        except TypeError:  # torch 2.9 and 2.10
            root.add_lambda_guard(holds, says)

    context.guards_context.dynamo_guards.add(Guard(GlobalStateSource(), create))
