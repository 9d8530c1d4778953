"""What an argument of a public function may be, and values that its docstring forbids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Maker = Callable[[], Any]
Wrong = tuple[str, Maker]
"""A label for reports, and what makes the value: fresh, as a call may change what it is given."""


@dataclass(frozen=True)
class Argument:
    """A valid value of an argument and the wrong ones.

    Attributes:
        says: what an error may call it, besides its own name.
    """

    valid: Maker
    wrong: Sequence[Wrong]
    says: tuple[str, ...] = ()

    def called(self, *names: str) -> Argument:
        """The same, spoken of by these names too."""
        return Argument(self.valid, self.wrong, (*self.says, *names))

    def but(self, *labels: str) -> Argument:
        """Without the wrong values of these labels, which this argument takes."""
        known = {label for label, _ in self.wrong}
        assert known >= set(labels), set(labels) - known
        return Argument(self.valid, [w for w in self.wrong if w[0] not in labels], self.says)

    def plus(self, **wrong: Any) -> Argument:
        """With further wrong values, by label."""
        return Argument(self.valid, [*self.wrong, *constants(**wrong)], self.says)


def constants(**values: Any) -> list[Wrong]:
    return [(label, lambda value=value: value) for label, value in values.items()]


class Stranger:
    """An object that is none of anything."""

    def __repr__(self) -> str:
        return "<a stranger>"


_NO_NUMBER: dict[str, Any] = {
    "text": "3", "true": True, "a list": [1], "a dict": {}, "complex": 1j, "a stranger": Stranger(),
    "nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"),
}  # fmt: skip


def integer(
    valid: int, low: int | None = None, high: int | None = None, optional: bool = False
) -> Argument:
    wrong = dict(_NO_NUMBER) | {"a half": valid + 0.5, "a float": float(valid)}
    if not optional:
        wrong["None"] = None
    if low is not None:
        wrong |= {"below": low - 1, "far below": -(10**12)}
    if high is not None:
        wrong |= {"above": high + 1, "huge": 10**30}
    return Argument(lambda: valid, constants(**wrong))


def number(
    valid: float,
    low: float | None = None,
    high: float | None = None,
    optional: bool = False,
    above: float | None = None,
    below: float | None = None,
) -> Argument:
    """Finite; from `low` to `high`, or `above` and `below` numbers that it is not."""
    wrong = dict(_NO_NUMBER)
    if not optional:
        wrong["None"] = None
    for name, bound, step in (("low", low, -1e-3), ("high", high, 1e-3)):
        if bound is not None:
            wrong |= {f"past {name}": bound + step, f"far past {name}": bound + 1e6 * step}
    for name, bound in (("lower", above), ("upper", below)):
        if bound is not None:
            wrong[f"at {name}"] = bound
    return Argument(lambda: valid, constants(**wrong))


def choice(valid: str, optional: bool = False) -> Argument:
    wrong: dict[str, Any] = {
        "unknown": "no-such", "empty": "", "a number": 3, "true": True, "a list": [valid],
        "bytes": valid.encode(), "a dict": {}, "a stranger": Stranger(),
    }  # fmt: skip
    if not optional:
        wrong["None"] = None
    return Argument(lambda: valid, constants(**wrong))


def text(valid: str) -> Argument:
    wrong = {"None": None, "a number": 3, "bytes": b"x", "a list": [], "a stranger": Stranger()}
    return Argument(lambda: valid, constants(**wrong))


def flag(valid: bool) -> Argument:
    wrong = {
        "None": None, "1": 1, "0.0": 0.0, "text": "yes", "a list": [], "nan": float("nan"),
        "a stranger": Stranger(),
    }  # fmt: skip
    return Argument(lambda: valid, constants(**wrong))


def instance(valid: Maker, optional: bool = False) -> Argument:
    """An object of one kind."""
    wrong: dict[str, Any] = {
        "a number": 3, "text": "x", "a list": [], "a dict": {}, "a class": Stranger,
        "a stranger": Stranger(),
    }  # fmt: skip
    if not optional:
        wrong["None"] = None
    return Argument(valid, constants(**wrong))


def tensor(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    optional: bool = False,
    any_shape: bool = False,
    any_kind: bool = False,
) -> Argument:
    """A dense tensor of one shape and a floating dtype, or of exactly one integer dtype.

    Args:
        any_shape: other shapes are allowed.
        any_kind: other dtypes, layouts and devices are allowed, as eager torch takes them.
    """

    def valid() -> torch.Tensor:
        if dtype.is_floating_point:
            return torch.rand(shape, dtype=dtype)
        return torch.zeros(shape, dtype=dtype)

    wrong: list[Wrong] = [
        ("a number", lambda: 1.5),
        ("text", lambda: "x"),
        ("a list", lambda: valid().tolist()),
        ("an array", lambda: np.ones(shape)),
        ("a stranger", Stranger),
    ]
    other_kinds: list[Wrong] = [
        ("bool", lambda: valid().bool()),
        ("complex", lambda: valid().to(torch.complex64)),
        ("meta", lambda: valid().to("meta")),
        ("sparse", lambda: valid().to_sparse()),
    ]
    if dtype.is_floating_point:
        other_kinds.append(("int64", lambda: valid().long()))
    else:
        other_kinds.append(("float32", lambda: valid().float()))
    if not any_kind:
        wrong += other_kinds
    if not optional:
        wrong.append(("None", lambda: None))
    if not any_shape:
        wrong += [
            ("another rank", lambda: valid()[None, None]),
            ("a larger first axis", lambda: torch.cat([valid()] * 3)),
            ("no axis", lambda: torch.tensor(1, dtype=dtype)),
        ]
    return Argument(valid, wrong)


def sequence(of: Argument, count: int, *, empty: bool = False, fixed: bool = False) -> Argument:
    """A list of `count` valid elements; wrong is also a list with one wrong element.

    Args:
        empty: whether none at all is allowed.
        fixed: whether another count is forbidden.
    """

    def valid() -> list[Any]:
        return [of.valid() for _ in range(count)]

    def with_one(make: Maker) -> Maker:
        return lambda: [*valid()[1:], make()]

    wrong: list[Wrong] = [*constants(**{"None": None, "a number": 3, "a stranger": Stranger()})]
    wrong += [(f"with {label}", with_one(make)) for label, make in of.wrong]
    if not empty:
        wrong.append(("empty", list))
    if fixed:
        wrong += [("one more", lambda: [*valid(), of.valid()]), ("one less", lambda: valid()[1:])]
    return Argument(valid, wrong)


def one_of(valid: Maker, **wrong: Any) -> Argument:
    """A valid value and exactly these wrong ones."""
    return Argument(valid, constants(**wrong))


@dataclass(frozen=True)
class Call:
    """A public function or class with a valid value of each argument.

    Attributes:
        covers: the name in `__all__` that this is a call of.
    """

    covers: str
    function: Callable[..., Any]
    arguments: dict[str, Argument]
    label: str = ""

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.label or self.covers
