"""Tells whether a forward does the same whenever its module, arguments and constants are the same.

Such a forward may be run once without values, and what it did be done again without running it
(`plans`). It is told by its code: by the names that it reads, and that it keeps nothing. What is
not known to be harmless is taken for harmful: the forward then runs itself, which is always right.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter, methodcaller
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

from fastnas.nn.built import KNOWN
from fastnas.nn.facts import PLAIN, are_same, behaviour, is_same

_LIBRARIES = frozenset(
    ("torch", "math", "operator", "_operator", "itertools", "functools", "_functools", "builtins")
)
_BUILTINS = frozenset(
    name
    for names in (
        "abs all any bool dict enumerate float getattr hasattr int isinstance len list map max min",
        "next iter range reversed set slice sorted str sum super tuple type zip",
        "NotImplementedError RuntimeError TypeError ValueError",
    )
    for name in names.split()
)
_KEEPS = re.compile("(STORE|DELETE)_(GLOBAL|ATTR|SUBSCR)|IMPORT_NAME")
"""Instructions by which something outlives the call."""
_CATCHES = re.compile("PUSH_EXC_INFO|JUMP_IF_NOT_EXC_MATCH|SETUP_FINALLY|(BEFORE|SETUP)_WITH")
"""Instructions of `try` and `with`: a tensor without values raises, and modes may be set."""
_READS = frozenset(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"))
_NOT_ALIKE = re.compile(
    r"^(is_|get_|set_)|seed|enabled|storage|_ptr$|^(Parameter|device|requires_grad|grad|grad_fn|stride"
    r"|layout|names|_version|train|eval|cuda|cpu|generator|backends)$"
)
"""Names of what tells or sets modes, or differs for a tensor without values."""
_OF_MODULES = set(dir(nn.Module)) - {
    *("forward", "children", "named_children", "modules", "named_modules", "__class__"),
    *("get_submodule", "__call__", "__init__", "training"),
}
"""What else modules have: it changes them, or reads their tensors."""
_IMPLICIT = {
    *("__call__", "__getattr__", "__getattribute__", "__getitem__", "__len__", "__iter__"),
    *("__next__", "__contains__", "__bool__", "__eq__", "__ne__"),
}
"""Methods that run without being named."""
_OF_TORCH = {*vars(nn.Module()), "forward", "new"}
_ABSENT = object()


class Impure(Exception):
    """Says why a forward may do something else in the next call."""


class Constants:
    """Holds all that the forwards of some modules read besides their arguments and parts.

    Args:
        modules: those outside of candidates.
        candidates: all the others.

    Raises:
        Impure: a forward reads or keeps something else.
    """

    def __init__(self, modules: Sequence[nn.Module], candidates: Iterable[nn.Module]) -> None:
        self.own: list[nn.Module] = []
        """Modules with tensors of their own."""
        self.names: list[tuple[Mapping[str, Any], str, object]] = []
        self.objects: list[tuple[object, type, Mapping[str, Any]]] = []
        self.sizes: list[tuple[Mapping[str, Any], int]] = []
        self.cells: list[tuple[Any, object]] = []
        self.containers: list[tuple[Any, Any]] = []
        self.functions: list[tuple[FunctionType, CodeType, object, object]] = []
        self._modules = {*modules, *candidates}
        self._kinds: dict[type, None] = {}
        self._objects: dict[int, Any] = {}  # by their addresses: they need not have a hash
        self._read, self._reads_any = {"forward"}, False
        self._seen: set[object] = set()
        for module in modules:
            has_tensors = bool(module._parameters or module._buffers)
            if behaviour(type(module)) in KNOWN or type(module).__module__.startswith("torch."):
                if has_tensors:  # running statistics would move
                    raise Impure(f"a {type(module).__name__} is no candidate")
                continue
            self._kinds[type(module)] = None
            if has_tensors:
                self.own.append(module)
        while self._look():
            pass

    def unchanged(self) -> bool:
        """Tells whether all of it is what it was."""
        # A builtin stands in no dict of globals; one that is put before it is found there.
        return (
            all(is_same(held.get(name, _ABSENT), value) for held, name, value in self.names)
            and all(
                type(value) is kind and vars(value) is held for value, kind, held in self.objects
            )
            and all(len(held) == size for held, size in self.sizes)
            and all(cell.cell_contents is value for cell, value in self.cells)
            and all(_holds_same(now, then) for now, then in self.containers)
            and all(
                f.__code__ is code and f.__defaults__ is defaults and f.__kwdefaults__ is named
                for f, code, defaults, named in self.functions
            )
        )

    def tensors(self) -> list[Tensor | None]:
        """Lists the tensors that the modules hold now."""
        dicts = [held for part in self.own for held in (part._parameters, part._buffers)]
        return [t for held in dicts for t in held.values()]

    def restored(self) -> bool:
        """Takes back what was done to the containers, and tells whether something was."""
        changed = [pair for pair in self.containers if not _holds_same(*pair)]
        for now, then in changed:
            if isinstance(now, list):
                now[:] = then
            else:
                now.clear()
                now.update(then)
        return bool(changed)

    # ---- what is read

    def _look(self) -> bool:
        """Takes what is read by the names known by now; tells whether there was something new."""
        before = len(self._seen)
        for kind in list(self._kinds):
            for base in kind.__mro__:
                if base.__module__.split(".")[0] not in _LIBRARIES:
                    if self._is_new((base, None)):
                        self.sizes.append((vars(base), len(vars(base))))
                    for name, value in vars(base).items():
                        if self._is_read(name) and self._is_new((base, name)):
                            self.names.append((vars(base), name, value))
                            self._member(value, f"{base.__name__}.{name}")
        for part in self._modules:
            for name, value in vars(part).items():
                if name not in _OF_TORCH and self._is_read(name) and self._is_new((part, name)):
                    self._value(value, f"{type(part).__name__}.{name}")
        for value in list(self._objects.values()):
            self._object(value)
        return len(self._seen) > before

    def _object(self, value: Any) -> None:
        """Takes the attributes and methods of an object whose names are read.

        Nobody else watches it, so names that it does not have are kept as well.
        """
        kind = type(value)
        if self._is_new((id(value), kind)):
            self.objects.append((value, kind, vars(value)))
            if _is_dataclass(kind):  # they are compared by all that they hold
                self._container(vars(value), kind.__name__)
        for owner in (value, *kind.__mro__[:-1]):
            held = vars(owner)
            if self._is_new((id(owner), None)):
                self.sizes.append((held, len(held)))
            for name in {*self._read, *_IMPLICIT, *filter(self._is_read, held)}:
                generated = name == "__eq__" and _is_dataclass(owner)
                if not generated and self._is_new((id(owner), name)):
                    found = held.get(name, _ABSENT)
                    self.names.append((held, name, found))
                    if found is not _ABSENT:
                        self._member(found, f"{kind.__name__}.{name}")

    def _is_read(self, name: str) -> bool:
        # `getattr` may ask for any name.
        return name in self._read or name in _IMPLICIT or (self._reads_any and name[:2] != "__")

    def _is_new(self, what: object) -> bool:
        new = what not in self._seen
        self._seen.add(what)
        return new

    def _member(self, value: Any, what: str) -> None:
        """Takes what stands in a class."""
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
        self._value(value.fget if type(value) is property else value, what)

    def _value(self, value: Any, what: str) -> None:
        """Takes a value that is read: what it holds, or does, has to stay as well."""
        kind = type(value)
        if kind in PLAIN or (isinstance(value, nn.Module) and value in self._modules):
            return
        if kind in (list, dict, set, tuple, frozenset):
            self._container(value, what)
        elif kind in (SimpleNamespace, Namespace):
            self.objects.append((value, kind, vars(value)))
            self._container(vars(value), what)
        elif _is_simple(kind):
            self._objects[id(value)] = value
        elif isinstance(value, ModuleType):
            if value.__name__.split(".")[0] not in _LIBRARIES:
                raise Impure(f"it reads the module {value.__name__}")
        elif value is attrgetter or value is methodcaller:
            raise Impure(f"it reads what {what} names")
        elif isinstance(value, type):
            if issubclass(value, nn.Module):
                self._kinds[value] = None
            elif value.__module__.split(".")[0] not in _LIBRARIES:
                raise Impure(f"it uses the class {what}")
        elif kind is FunctionType:
            self._function(value)
        elif kind is not BuiltinFunctionType or not _is_harmless(value):
            raise Impure(f"it reads {what}, a {kind.__name__}")
        else:
            self._reads_any |= value is getattr or value is hasattr

    def _container(self, value: Any, what: str) -> None:
        if not self._is_new(id(value)):
            return
        if not isinstance(value, tuple | frozenset):
            self.containers.append((value, type(value)(value)))
        for item in (*value.keys(), *value.values()) if isinstance(value, dict) else value:
            self._value(item, f"a part of {what}")

    def _function(self, function: FunctionType) -> None:
        """Takes what a function in Python reads, and those that it calls."""
        name = function.__name__
        if _is_of_library(function):
            # A decorator of theirs may be around a function of the user.
            if _NOT_ALIKE.search(name) or not _holds_nothing(function):
                raise Impure(f"it calls {name}")
            return
        if not self._is_new(function):
            return
        kept = function.__code__, function.__defaults__, function.__kwdefaults__
        self.functions.append((function, *kept))
        self.sizes.append((vars(function), len(vars(function))))
        for default in (kept[1], kept[2], *vars(function).values()):
            self._value(default, f"a default of {name}")
        if not {"__wrapped__"}.issuperset(vars(function)):
            raise Impure(f"{name} has attributes")
        for free, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            self.cells.append((cell, cell.cell_contents))
            if free != "__class__":
                self._value(cell.cell_contents, free)
        for code in _nested(function.__code__):
            self._code(code, function)

    def _code(self, code: CodeType, function: FunctionType) -> None:
        steps = list(dis.get_instructions(code))
        for before, step in zip([None, *steps], steps):
            kind, name = step.opname, step.argval
            if _KEEPS.match(kind) or _CATCHES.match(kind):
                raise Impure(f"{function.__name__}: {kind} {name}")
            if kind == "STORE_DEREF" and name in function.__code__.co_freevars:
                raise Impure(f"{function.__name__}: {kind} {name}")
            # The type of a tensor without values is another one.
            if kind in ("IS_OP", "COMPARE_OP") and before and before.argval == "Tensor":
                raise Impure(f"{function.__name__} compares with Tensor")
            if kind in ("LOAD_GLOBAL", "LOAD_NAME"):
                self._named(name)
                self._global(name, function.__globals__)
            elif kind in _READS:
                # Its settings may have any names.
                own_setting = before is not None and before.argval == "self"
                if name in _OF_MODULES or (_NOT_ALIKE.search(name) and not own_setting):
                    raise Impure(f"{function.__name__} reads {name}")
                self._named(name)
                self._read.add(name)

    def _named(self, name: str) -> None:
        """Takes a name by which others may be asked for: a text, which is not looked at."""
        self._reads_any |= name in ("getattr", "hasattr")
        if name in ("attrgetter", "methodcaller"):
            raise Impure(f"it reads what {name} names")

    def _global(self, name: str, held: dict[str, Any]) -> None:
        self.names.append((held, name, held.get(name, _ABSENT)))
        if name in held:
            self._value(held[name], name)
        elif name not in _BUILTINS or not hasattr(builtins, name):
            raise Impure(f"it calls {name}")


def _is_of_library(value: object) -> bool:
    """Tells whether it is a function of a library: a decorated one says that it is of the user."""
    if isinstance(value, BuiltinFunctionType):
        return _is_harmless(value)
    if not isinstance(value, FunctionType):
        return False
    return str(value.__globals__.get("__name__", "")).split(".")[0] in _LIBRARIES


def _holds_nothing(value: object) -> bool:
    """Tells whether functions that a function of a library calls are of libraries themselves."""
    if type(value) in PLAIN:
        return True
    held = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    return _is_of_library(value) and all(map(_holds_nothing, held))


def _is_harmless(function: BuiltinFunctionType) -> bool:
    """Tells whether it is of a library, and tells nothing of modes."""
    of = (getattr(function, "__module__", None) or "").split(".")[0]
    ours = of in _LIBRARIES and (of != "builtins" or function.__name__ in _BUILTINS)
    return ours and not _NOT_ALIKE.search(function.__name__)


def _nested(code: CodeType) -> Iterator[CodeType]:
    """Yields the code of a function and of those written in it, generators for one."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _is_simple(kind: type) -> bool:
    """Tells whether objects of a class are no more than their attributes and methods.

    Classes in C have other special methods, and nobody names those that operators call. Methods of
    a library are not looked into.
    """
    bases = kind.__mro__[:-1]
    if type(kind) is not type or not kind.__dictoffset__:
        return False
    return all(
        base.__module__.split(".")[0] not in _LIBRARIES
        and {name for name in vars(base) if name[:2] == "__"} <= _special_of(base)
        for base in bases
    )


def _special_of(base: type) -> set[str]:
    """Returns the special names that a class may have, and be no more than its attributes."""
    generated = _OF_DATACLASSES if _is_dataclass(base) else set()
    return {*vars(_Empty), *_IMPLICIT, *_OF_WRITERS, *generated}


def _is_dataclass(kind: object) -> bool:
    """Tells whether a class, not one above it, is a dataclass whose methods are all generated."""
    if not isinstance(kind, type) or "__dataclass_params__" not in vars(kind):
        return False
    made = (vars(kind).get(name) for name in ("__eq__", "__repr__", "__hash__"))
    # Generated code has no file. `__repr__` is in a wrapper against recursion, `__hash__` is None.
    written = (getattr(inspect.unwrap(f), "__code__", None) for f in made if callable(f))
    return all(code is None or code.co_filename == "<string>" for code in written)


class _Empty:
    """Has attributes, and nothing else."""


_OF_WRITERS = {"__init__", "__annotations__", "__setattr__", "__delattr__", "__slotnames__"}
"""Special names of no matter to who only reads; `copy` puts the last one into a class."""
_OF_DATACLASSES = {
    *("__dataclass_fields__", "__dataclass_params__", "__match_args__", "__repr__", "__hash__"),
    "__replace__",
}
"""Special names that a dataclass has besides; what they do is known."""


def _holds_same(now: Any, then: Any) -> bool:
    """Tells whether a container holds what its copy does; those in it are watched themselves."""
    if isinstance(now, dict):
        return list(now) == list(then) and are_same(list(now.values()), list(then.values()))
    if isinstance(now, list):
        return are_same(now, then)
    return bool(now == then)
