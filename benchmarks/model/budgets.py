"""Holds what the hot parts of the CUDA kernels may cost, and finds what they do cost.

A part is named by functions of the source, so a kernel may be cut anew without a change here. What
it costs is counted where mixed ops of the default network run it, at B = 64 and each stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from fastnas.benchmarks.model.counting import LaunchCount, Work
from fastnas.benchmarks.model.regions import LOADS, STORES, Region, ratio

STAGES = ((64, 16, 32, 32), (64, 32, 16, 16), (64, 64, 8, 8))
"""Shapes of the states of the default network."""
CONVOLUTIONS = ("convolve", "transpose")
STAGING = ("stage", "stage_taps", "wait_staged", "clear")
DIVISIONS = ("MUFU", "CALL", "F2I")
"""What a division is made of, whether of floats or of integers."""


@dataclass(frozen=True)
class Bound:
    """Holds the least or the most that a figure of a part may be."""

    name: str
    figure: Callable[[Work, Region], float]
    least: float | None = None
    most: float | None = None

    def holds(self, value: float) -> bool:
        low, high = self.least, self.most
        return (low is None or value >= low) and (high is None or value <= high)

    def __str__(self) -> str:
        return f"at most {self.most:g}" if self.least is None else f"at least {self.least:g}"


@dataclass(frozen=True)
class Budget:
    """Holds the bounds of a part: of the instructions that come from some functions.

    What was inlined into the functions belongs to them; without functions it is the whole kernel.
    """

    part: str
    functions: tuple[str, ...]
    bounds: tuple[Bound, ...]


@dataclass(frozen=True)
class Figure:
    """Holds one figure of a part, as a mixed op of some shape ran it, and its bound."""

    part: str
    kernel: str
    shape: tuple[int, ...]
    bound: Bound
    value: float

    @property
    def holds(self) -> bool:
        return self.bound.holds(self.value)


def _percent(*pipes: str) -> Callable[[Work, Region], float]:
    return lambda _, part: 100 * part.share(*pipes)


def _wide(*names: str) -> Callable[[Work, Region], float]:
    """Returns the share of what is moved that goes by 16 bytes a lane."""
    return lambda _, part: 100 * ratio(part.moved_bytes(names, least=16), part.moved_bytes(names))


def _staged(work: Work, part: Region) -> float:
    return 100 * part.total / Region.of(work, (*STAGING, *CONVOLUTIONS, "correlate")).total


def _fold(part: str, function: str, wide_loads: int) -> Budget:
    """Bounds what is done for each partial sum, of which a thread loads so many quads."""

    def groups(region: Region) -> float:
        return region.wide_loads() / wide_loads

    return Budget(
        part,
        (function,),
        (
            Bound("instructions a group", lambda _, own: ratio(own.total, groups(own)), most=60),
            Bound(
                "divisions a group",
                lambda _, own: ratio(own.named(*DIVISIONS), groups(own)),
                most=0.1,
            ),
        ),
    )


BUDGETS: Sequence[Budget] = (
    Budget(
        "load of a tile",
        ("load_tile",),
        (
            Bound("instructions an element", lambda _, part: part.per_element(4), most=8),
            Bound("% loaded by 16 bytes a lane", _wide(*LOADS), least=100),
            Bound("loads in flight", lambda _, part: part.loads_in_flight(), least=4),
        ),
    ),
    Budget("depthwise", CONVOLUTIONS, (Bound("% FFMA", _percent("FFMA"), least=65),)),
    Budget(
        "staging",
        STAGING,
        (
            Bound("% of it and the convolutions", _staged, most=10),
            Bound("loads in flight", lambda _, part: part.loads_in_flight(), least=4),
        ),
    ),
    Budget("product", ("add_product",), (Bound("% FFMA", _percent("FFMA"), least=75),)),
    Budget("Gram and cross", ("add_cross",), (Bound("% FFMA", _percent("FFMA"), least=70),)),
    Budget("weight gradient", ("correlate",), (Bound("% FFMA", _percent("FFMA"), least=60),)),
    _fold("merge of Gram matrices", "merge_grams", 3),
    _fold("merge of cross matrices", "merge_crosses", 1),
    Budget(
        "kernel",
        (),
        (
            Bound("% stored by 16 bytes a lane", _wide(*STORES), least=95),
            Bound("spills", lambda _, part: part.named("LDL", "STL"), most=0),
            Bound("bytes of stack", lambda work, _: work.kernel.stack, most=0),
            Bound("registers", lambda work, _: work.kernel.registers, most=168),
        ),
    ),
)


def figures(shape: tuple[int, ...], launches: Iterable[LaunchCount]) -> Iterator[Figure]:
    """Finds the figures of all parts that some launches of a mixed op ran, kernel by kernel."""
    works: dict[str, Work] = {}
    for launch in launches:
        name = launch.kernel.name.split("(")[0]
        works[name] = works[name] + launch.work if name in works else launch.work
    for budget in BUDGETS:
        for name, work in works.items():
            part = Region.of(work, budget.functions)
            for bound in budget.bounds if part.total else ():
                value = bound.figure(work, part)
                if not math.isnan(value):
                    yield Figure(budget.part, name, shape, bound, value)
