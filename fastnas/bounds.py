"""Says which numbers a setting may have: finite ones, with a bound on both sides."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastnas.checks import short


@dataclass(frozen=True)
class Bounds:
    """Holds the finite interval that a number must lie in.

    Attributes:
        low, high: its ends.
        whole: whether the number must be an integer.
        above, below: whether the low end, or the high end, is itself left out.
    """

    low: float
    high: float
    whole: bool = False
    above: bool = False
    below: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"bounds are {self.low} and {self.high}; finite ends are needed")

    def __str__(self) -> str:
        before, until = "above " if self.above else "", "below " if self.below else ""
        return f"{before}{_written(self.low)} to {until}{_written(self.high)}"

    def __contains__(self, value: float) -> bool:
        """Returns whether the number lies within; NaN and infinities never do."""
        # NaN compares as false, so it lies outside of all bounds.
        is_high_enough = value > self.low if self.above else value >= self.low
        return is_high_enough and (value < self.high if self.below else value <= self.high)

    def check(self, name: str, value: object) -> None:
        """Refuses a value that is no such number.

        Raises:
            ValueError: naming the setting, what was given and what is allowed.
        """
        # `type` is asked and not isinstance, to which True is an int.
        is_number = type(value) is int or (type(value) is float and not self.whole)
        if not is_number or value not in self:  # type: ignore[operator]
            what = "a whole number" if self.whole else "a number"
            raise ValueError(f"{name} is {short(value)}; {what} is needed, {self}")


def whole(low: int, high: int) -> Bounds:
    """Returns the bounds of an integer, both ends included."""
    return Bounds(low, high, whole=True)


THREADS = whole(1, 1024)
"""Of a process; far more end it inside the OpenMP library."""


def _written(end: float) -> str:
    # The largest seed is known by its power of two, not by its nineteen digits.
    if isinstance(end, int) and end > 1 << 32 and end & (end + 1) == 0:
        return f"2^{end.bit_length()}-1"
    return str(int(end)) if float(end).is_integer() and abs(end) <= 1e9 else f"{end:g}"
