"""Tells whether a forward does the same whenever its module, arguments and constants are the same.

Such a forward may be run once without values, and what it did be done again without running it
(`plans`). It is told by its code: which names it reads, and that it keeps nothing.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

from fastnas.nn.built import KNOWN
from fastnas.nn.facts import behaviour

_LIBRARIES = ("torch", "math", "operator", "itertools", "functools")
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
_CATCHES = re.compile("CHECK_EXC_MATCH|JUMP_IF_NOT_EXC_MATCH|SETUP_FINALLY|(BEFORE|SETUP)_WITH")
"""Instructions of `try` and `with`: a tensor without values raises, and modes may be set."""
_READS = frozenset(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"))
_NOT_ALIKE = re.compile(
    r"^(is_|get_|set_)|seed|enabled|^(device|requires_grad|grad|grad_fn|stride|storage"
    r"|untyped_storage|data_ptr|layout|names|_version|train|eval|cuda|cpu|generator)$"
)
"""Attributes that tell or set modes, or differ for a tensor without values."""


_OF_MODULES = set(dir(nn.Module)) - {
    *("forward", "children", "named_children", "modules", "named_modules", "__class__"),
    *("get_submodule", "__call__", "__init__", "training"),
}
"""What else modules have: it changes them, or reads their tensors."""


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
        self._modules = {*modules, *candidates}
        self.names: list[tuple[dict[str, Any], str, object]] = []
        self.cells: list[tuple[Any, object]] = []
        self.containers: list[tuple[object, object]] = []
        self._seen: set[CodeType] = set()
        self.own: list[nn.Module] = []
        """Those with tensors of their own."""
        for module in modules:
            has_tensors = bool(module._parameters or module._buffers)
            if behaviour(type(module)) in KNOWN or type(module).__module__.startswith("torch."):
                if has_tensors:  # running statistics would move
                    raise Impure(f"a {type(module).__name__} is no candidate")
                continue
            if has_tensors:
                self.own.append(module)
            for name, value in vars(module).items():
                if name not in _OF_TORCH:
                    self._value(value, f"{type(module).__name__}.{name}", type(module))
            self._function(type(module).forward, type(module))

    def unchanged(self) -> bool:
        """Tells whether all of it is what it was."""
        # A builtin stands in no dict of globals; one that is put before it is found there.
        return (
            all(held.get(name, _ABSENT) is value for held, name, value in self.names)
            and all(cell.cell_contents is value for cell, value in self.cells)
            and all(now == then for now, then in self.containers)
        )

    def tensors(self) -> list[Tensor | None]:
        """Lists the tensors that the modules hold now."""
        dicts = [held for part in self.own for held in (part._parameters, part._buffers)]
        return [t for held in dicts for t in held.values()]

    def restored(self) -> bool:
        """Takes back what was done to the containers, and tells whether something was."""
        changed = [(now, then) for now, then in self.containers if now != then]
        for now, then in changed:
            if isinstance(now, list):
                now[:] = _copied(then)
            else:
                now.clear()  # type: ignore[attr-defined]
                now.update(_copied(then))  # type: ignore[attr-defined]
        return bool(changed)

    def _hold(self, value: object, what: str) -> None:
        """Takes a plain value, or a container of plain ones, whose contents may change."""
        if isinstance(value, list | dict | set):
            self._check_plain(value, what)
            self.containers.append((value, _copied(value)))
        elif _is_record(value):
            self._hold(vars(value), what)
        else:
            self._check_plain(value, what)

    def _check_plain(self, value: object, what: str) -> None:
        """Raises `Impure` for what is no plain value, no part, and no container of such."""
        if isinstance(value, dict):
            value = [*value.keys(), *value.values()]
        if isinstance(value, list | tuple | set | frozenset):
            for item in value:
                self._check_plain(item, what)
            return
        plain = value is None or isinstance(value, bool | int | float | str | type)
        if not (plain or (isinstance(value, nn.Module) and value in self._modules)):
            raise Impure(f"it reads {what}, a {type(value).__name__}")

    def _function(self, function: Any, kind: type) -> None:
        """Takes what a function in Python reads, and those that it calls."""
        function = inspect.unwrap(function)
        if not isinstance(function, FunctionType):
            raise Impure(f"{function!r} is no function in Python")
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            if name != "__class__":
                self._value(cell.cell_contents, name, kind)
            self.cells.append((cell, cell.cell_contents))
        for code in _nested(function.__code__):
            if code not in self._seen:
                self._seen.add(code)
                self._code(code, function.__globals__, kind)

    def _code(self, code: CodeType, held: dict[str, Any], kind: type) -> None:
        steps = list(dis.get_instructions(code))
        for before, step in zip([None, *steps], steps):
            if _KEEPS.match(step.opname) or _CATCHES.match(step.opname):
                raise Impure(f"{code.co_name}: {step.opname} {step.argval}")
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                name = step.argval
                self.names.append((held, name, held.get(name, _ABSENT)))
                if name in held:
                    self._value(held[name], name, kind)
                elif name not in _BUILTINS:
                    raise Impure(f"{code.co_name} calls {name}")
            elif step.opname in _READS:
                # Its settings may have any names.
                own_setting = before is not None and before.argval == "self"
                if _NOT_ALIKE.search(step.argval) and not own_setting:
                    raise Impure(f"{code.co_name} reads {step.argval}")
                if step.argval in _OF_MODULES:
                    raise Impure(f"{code.co_name} calls {step.argval}")
                own = inspect.getattr_static(kind, step.argval, None)
                own = own.fget if isinstance(own, property) else own
                own = own.__func__ if isinstance(own, staticmethod | classmethod) else own
                # Those of torch ask for nothing but parts.
                if isinstance(own, FunctionType) and not _is_library(own):
                    self._function(own, kind)

    def _value(self, value: object, name: str, kind: type) -> None:
        if isinstance(value, ModuleType):
            if not value.__name__.startswith(_LIBRARIES):
                raise Impure(f"it reads the module {value.__name__}")
        elif isinstance(value, BuiltinFunctionType):
            if not _is_library(value) and getattr(builtins, name, None) is not value:
                raise Impure(f"it calls {name}")
        elif isinstance(value, type):
            if not (issubclass(value, nn.Module) or _is_library(value)):
                raise Impure(f"it uses the class {name}")
        elif callable(value):
            if not _is_library(value):
                self._function(value, kind)
        else:
            self._hold(value, name)


_ABSENT = object()
_OF_TORCH = {*vars(nn.Module()), "forward", "new"}


def _is_library(value: Any) -> bool:
    module = getattr(value, "__module__", None) or ""
    return module.split(".")[0].lstrip("_") in (*_LIBRARIES, "builtins")


def _nested(code: CodeType) -> Iterator[CodeType]:
    """Yields the code of a function and of those written in it, generators for one."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _is_record(value: object) -> bool:
    """Tells whether an object has attributes and nothing that could be called."""
    kind = type(value)
    if not (is_dataclass(kind) or kind in (SimpleNamespace, Namespace)):
        return False
    own = [attribute for base in kind.__mro__[:-1] for attribute in vars(base).items()]
    return hasattr(value, "__dict__") and not any(
        callable(attribute) or isinstance(attribute, property)
        for name, attribute in own
        if not name.startswith("__") or name in ("__getattr__", "__getattribute__")
    )


def _copied(value: Any) -> Any:
    """Returns a container with the same plain values in it."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return type(value)(map(_copied, value)) if isinstance(value, list | tuple | set) else value
