"""Checks of arguments that all parts share: what was given, by its name, and what is allowed.

A check raises TypeError for another type and ValueError for another value. A bool is no number and
a float no whole number; the scalars of NumPy are. Settings have bounds: `fastnas.bounds`.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable
from numbers import Integral, Real

LONGEST = 60
LONGEST_NUMBER = 128
"""Bits of an integer that is written out."""
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = 4 * LONGEST


def short(value: object) -> str:
    """The repr of a value, cut to what fits into a line.

    By its aliases a YAML file of a few hundred bytes holds a list whose repr is gigabytes, and
    Python refuses to write out an integer of more than 4,300 digits.
    """
    if isinstance(value, int) and value.bit_length() > LONGEST_NUMBER:
        return f"a whole number of {value.bit_length()} bits"
    text = _SHORT.repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def check_type(name: str, value: object, *kinds: type) -> None:
    """`value` is an instance of one of `kinds`."""
    if not isinstance(value, kinds):
        needed = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{name} is {short(value)}; {needed} is needed")


def check_flag(name: str, value: object) -> None:
    """`value` is True or False."""
    check_type(name, value, bool)


def check_int(name: str, value: object, low: int | None = None, high: int | None = None) -> None:
    """`value` is a whole number, at least `low` and at most `high` where they are given."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is {short(value)}; a whole number is needed")
    if low is not None and int(value) < low:
        raise ValueError(f"{name} is {short(value)}; at least {low} is needed")
    if high is not None and int(value) > high:
        raise ValueError(f"{name} is {short(value)}; at most {high} is allowed")


def check_number(name: str, value: object) -> None:
    """`value` is a finite real number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} is {short(value)}; a number is needed")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {short(value)}; a finite number is needed")


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """`value` is one of the allowed texts."""
    known = list(allowed)
    if value not in known:
        raise ValueError(f"{name} is {short(value)}; allowed: {', '.join(known)}")


def check_texts(name: str, value: object) -> None:
    """`value` is a list or tuple of texts, none of them empty and none twice; one at least."""
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name} is {short(value)}; a list or tuple of names is needed")
    for i, item in enumerate(value):
        if not isinstance(item, str) or not item:
            raise TypeError(f"{name}[{i}] is {short(item)}; a name is needed")
    if not value or len(set(value)) < len(value):
        raise ValueError(f"{name} is {short(value)}; one or more names are needed, none twice")
