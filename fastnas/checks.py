"""Checks arguments for all parts: an error names the argument, what was given and what is allowed.

A check raises TypeError for another type and ValueError for another value. A bool is no number and
a float no whole number; the scalars of NumPy are. Settings have bounds: `fastnas.bounds`.
"""

from __future__ import annotations

import functools
import inspect
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import torch

LONGEST = 60
LONGEST_NUMBER = 128
"""Bits of an integer that is written out."""


class _Short(reprlib.Repr):
    def repr_int(self, value: int, level: int) -> str:
        """Shortens an integer of thousands of digits, also inside of a list."""
        bits = value.bit_length()
        return f"a whole number of {bits} bits" if bits > LONGEST_NUMBER else repr(value)


_SHORT = _Short()
# reprlib cuts while it writes, so a nest of lists is never written out whole.
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = 4 * LONGEST


def short(value: object) -> str:
    """Returns the repr of a value, cut to what fits into a line.

    By its aliases a YAML file of a few hundred bytes holds a list whose repr is gigabytes, and
    Python refuses to write out an integer of more than 4,300 digits.
    """
    text = _SHORT.repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def check_type(name: str, value: object, *kinds: type) -> None:
    """Refuses a `value` that is an instance of none of `kinds`."""
    if not isinstance(value, kinds):
        needed = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{name} is {short(value)}; {needed} is needed")


def check_flag(name: str, value: object) -> None:
    """Refuses a `value` other than True and False."""
    check_type(name, value, bool)


def check_int(name: str, value: object, low: int | None = None, high: int | None = None) -> None:
    """Refuses what is no whole number, or is below `low` or above `high` where they are given."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is {short(value)}; a whole number is needed")
    if low is not None and int(value) < low:
        raise ValueError(f"{name} is {short(value)}; at least {low} is needed")
    if high is not None and int(value) > high:
        raise ValueError(f"{name} is {short(value)}; at most {high} is allowed")


def check_number(name: str, value: object) -> None:
    """Refuses what is no finite real number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} is {short(value)}; a number is needed")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {short(value)}; a finite number is needed")


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Refuses what is none of the allowed texts."""
    known = list(allowed)
    if value not in known:
        raise ValueError(f"{name} is {short(value)}; allowed: {', '.join(known)}")


def check_texts(name: str, value: object) -> None:
    """Refuses what is no list or tuple of texts, and an empty text, an empty list, a text twice."""
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name} is {short(value)}; a list or tuple of names is needed")
    for i, item in enumerate(value):
        if not isinstance(item, str) or not item:
            raise TypeError(f"{name}[{i}] is {short(item)}; a name is needed")
    if not value or len(set(value)) < len(value):
        raise ValueError(f"{name} is {short(value)}; one or more names are needed, none twice")


F = TypeVar("F", bound=Callable[..., Any])


def typed(function: F) -> F:
    """Checks the arguments of each call of a function by its annotations, elements included.

    A number has to be finite, a `float` may be a whole number, a `Sequence` is a list, a tuple, a
    range or an array. Nothing is checked while torch.compile traces, which cannot follow it.
    """
    signature = inspect.signature(function)
    hints: dict[str, Any] = {}

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if not hints:  # not earlier: an annotation may name a class that is defined below
            hints.update(get_type_hints(function))
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if name in hints and name != "self":
                check_hint(name, value, hints[name])
        return function(*args, **kwargs)

    return cast(F, checked)


def check_fields(instance: Any) -> None:
    """Refuses a dataclass with a field that is not what it is annotated as."""
    for name, hint in get_type_hints(type(instance)).items():
        if name in instance.__dataclass_fields__:
            check_hint(name, getattr(instance, name), hint)


def check_hint(name: str, value: Any, hint: Any) -> None:
    """Refuses a `value` that is not what an annotation says."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        _check_union(name, value, inner)
    elif origin is Sequence:
        # Texts are sequences too, so `Sequence` itself would take "skip" for four names.
        if not isinstance(value, list | tuple | range) and not hasattr(value, "__array__"):
            raise TypeError(f"{name} is {short(value)}; a list or a tuple is needed")
        for i, item in enumerate(value):
            check_hint(f"{name}[{i}]", item, inner[0])
    elif origin is Mapping:
        check_type(name, value, Mapping)
        for key, item in value.items():
            check_hint(f"a key of {name}", key, inner[0])
            check_hint(f"{name}[{short(key)}]", item, inner[1])
    elif origin is tuple and Ellipsis not in inner:
        if not isinstance(value, list | tuple) or len(value) != len(inner):
            raise TypeError(f"{name} is {short(value)}; {len(inner)} values are needed")
        for i, (item, one) in enumerate(zip(value, inner)):
            check_hint(f"{name}[{i}]", item, one)
    elif origin is Literal:
        check_choice(name, value, inner)
    elif hint is int:
        check_int(name, value)
    elif hint is float:
        check_number(name, value)
    # What is left are classes; of generic ones the elements are not looked at.
    elif isinstance(origin or hint, type) and hint is not Any:
        check_type(name, value, origin or hint)


def _check_union(name: str, value: Any, hints: Sequence[Any]) -> None:
    """Names all members of a union of classes in its error, or passes on the last one's."""
    plain = [hint for hint in hints if isinstance(hint, type) and hint not in (int, float)]
    if value is None and NoneType in hints:
        return
    if len(plain) == len(hints):
        check_type(name, value, *plain)
        return
    *others, last = [hint for hint in hints if hint is not NoneType]
    for hint in others:
        try:
            return check_hint(name, value, hint)
        except (TypeError, ValueError):
            continue
    check_hint(name, value, last)
