"""Looks at parts of a kernel by the functions of their source, as launches ran them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fastnas.benchmarks.model.counting import Work
from fastnas.benchmarks.model.functions import functions_of
from fastnas.benchmarks.model.sass import Instruction, Kernel

LANES = 32
# LD and ST are by addresses of which the compiler did not know whether they are global or shared.
LOADS, STORES = ("LDG", "LDGSTS", "LD"), ("STG", "ST")


@lru_cache
def _functions(kernel: Kernel) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(functions_of(each)) for each in kernel.instructions)


def ratio(part: float, whole: float) -> float:
    """Returns part / whole; of nothing it is NaN."""
    return part / whole if whole else math.nan


@dataclass(frozen=True)
class Region:
    """Holds the instructions of some functions, with what launches did by them."""

    instructions: Sequence[Instruction]
    issued: NDArray[np.float64]
    lanes: NDArray[np.float64]
    in_flight: NDArray[np.float64]

    @staticmethod
    def of(work: Work, functions: Collection[str] = ()) -> Region:
        """Picks the instructions; without `functions` those of the whole kernel."""
        wanted = set(functions)
        kept = [i for i, own in enumerate(_functions(work.kernel)) if not wanted or own & wanted]
        instructions = [work.kernel.instructions[i] for i in kept]
        return Region(instructions, *(x[kept] for x in (work.issued, work.lanes, work.in_flight)))

    @property
    def total(self) -> float:
        """Returns how many instructions warps issued."""
        return float(self.issued.sum())

    def share(self, *pipes: str) -> float:
        """Returns the share of the instructions that go to these pipes."""
        return ratio(self._issued_where(lambda each: each.pipe in pipes), self.total)

    def named(self, *names: str) -> float:
        """Returns how many instructions of these names warps issued."""
        return self._issued_where(lambda each: each.name in names)

    def wide_loads(self) -> float:
        """Returns how many loads of 16 bytes a lane warps issued."""
        return self._issued_where(lambda each: each.name in LOADS and each.width == 16)

    def moved_bytes(self, names: Collection[str], least: int = 1) -> float:
        """Returns the bytes that instructions of at least so many a lane brought or took."""
        widths = np.array([each.width if each.name in names else 0 for each in self.instructions])
        return float((self.lanes * widths)[widths >= least].sum())

    def per_element(self, size: int) -> float:
        """Returns the instructions of a warp for each element that each lane loads."""
        return ratio(self.total * LANES, self.moved_bytes(LOADS) / size)

    def loads_in_flight(self) -> float:
        """Returns how many loads of global memory a warp had under way at most."""
        return float(self.in_flight.max(initial=0))

    def _issued_where(self, holds: Callable[[Instruction], bool]) -> float:
        own = np.array([holds(each) for each in self.instructions], bool)
        return float(self.issued[own].sum())
