"""Counts what a launch does: some of its blocks run on the machine and stand for the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fastnas.benchmarks.model.machine import TALLY_NAMES, Counters, Program, Run, Shape
from fastnas.benchmarks.model.sass import Kernel

_T = TypeVar("_T")

SECTOR = 32
MOST_BLOCKS = 96
"""Of a grid about so many blocks run; a smaller one is run whole."""
MOST_ROWS = 48
"""Of blockIdx.y and z together so many are run, evenly spread; each is usually a job of its own."""
SCHEDULERS = 4
"""Of a multiprocessor; each issues an instruction a cycle."""
# Cycles for which an instruction keeps a pipe of its scheduler, by the first part of its name, and
# by the pipe where it is not named here. FFMA and its like have two half pipes, of which IMAD takes
# one; 16 lanes a cycle compare, shift and select.
_PIPES: Mapping[str, tuple[str, float]] = {
    "FFMA": ("fma", 1), "FADD": ("fma", 1), "FMUL": ("fma", 1), "IMAD": ("fma", 1),
    "FP32": ("alu", 2), "INTEGER": ("alu", 2), "FP16": ("fma", 1), "FP64": ("fp64", 2),
    "CONVERT": ("convert", 2), "MUFU": ("special", 8), "HMMA": ("tensor", 8),
}  # fmt: skip


@dataclass(frozen=True)
class BlockCount:
    """Counts what one block does; `blocks` of the grid are alike.

    Attributes:
        cycles: of its longest warp, where lines come from L2, and where they come from memory.
        issue: cycles of a multiprocessor that its instructions take to be issued.
        busy: cycles of a multiprocessor for which its busiest pipe is taken.
    """

    blocks: float
    cycles: tuple[float, float]
    issue: float
    busy: float


@dataclass(frozen=True)
class Work:
    """Counts what was done by each instruction of a kernel.

    Attributes:
        sums: three rows: by how many warps and by how many lanes it was executed, and the cycles
            that warps spent on it, waiting included, as if each were alone.
        in_flight: how many loads of global memory a warp had under way behind it at most.
    """

    kernel: Kernel
    sums: NDArray[np.float64]
    in_flight: NDArray[np.float64]

    @property
    def issued(self) -> NDArray[np.float64]:
        return self.sums[0]

    @property
    def lanes(self) -> NDArray[np.float64]:
        return self.sums[1]

    @property
    def cycles(self) -> NDArray[np.float64]:
        return self.sums[2]

    def __add__(self, other: Work) -> Work:
        assert self.kernel == other.kernel
        in_flight = np.maximum(self.in_flight, other.in_flight)
        return Work(self.kernel, self.sums + other.sums, in_flight)


@dataclass(frozen=True)
class LaunchCount:
    """Counts a whole launch.

    Attributes:
        fold_cycles: what the last block of each job adds to its own way, if blocks count arrivals.
        read, written: bytes that differ.
        moved: bytes between L2 and the multiprocessors.
    """

    work: Work
    grid: tuple[int, int, int]
    threads: int
    shared: int
    blocks: tuple[BlockCount, ...]
    fold_cycles: tuple[float, float]
    read: float
    written: float
    moved: float

    @property
    def kernel(self) -> Kernel:
        return self.work.kernel


def count_launch(program: Program, shape: Shape) -> LaunchCount:
    """Runs blocks of a launch and counts it; the memory of the process stays as it is."""
    run = Run(program, shape)
    try:
        return _Sample(run).counted()
    finally:
        run.close()


class _Sample:
    """Runs some blocks of a launch, which stand for those around them.

    Of blockIdx.x some columns run, each in all rows of y and z, or evenly spread ones.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        x, y, z = run.shape.grid
        self.rows = _spread(list(product(range(y), range(z))), MOST_ROWS)
        self.columns = _spread(range(x), max(2, MOST_BLOCKS // len(self.rows)))
        self.alike = x / len(self.columns) * y * z / len(self.rows)
        self.work = Work(
            run.program.kernel, np.zeros((3, len(run.tally))), np.zeros(len(run.tally))
        )
        self.blocks: list[BlockCount] = []
        self.counters: dict[tuple[int, ...], Counters] = {}
        self.sectors: list[tuple[int, int]] = []
        """How many were read and written after each column."""

    def counted(self) -> LaunchCount:
        for column in self.columns:
            for row in self.rows:
                self._count((column, *row))
            self.sectors.append(self.run.sectors())
        fold_cycles = self._count_folds()
        kernel, shape = self.run.program.kernel, self.run.shape
        moved = sum(each.load_sectors + each.store_sectors for each in self.counters.values())
        return LaunchCount(
            self.work, shape.grid, int(np.prod(shape.block)), kernel.shared + shape.dynamic_shared,
            tuple(self.blocks), fold_cycles, self._distinct(0), self._distinct(1),
            moved * self.alike * SECTOR,
        )  # fmt: skip

    def _run(self, index: tuple[int, ...], stands_for: float, last: bool = False) -> Counters:
        """Runs a block and adds what it did, so often, to the launch's."""
        self.run.tally[:] = 0
        counted = self.run.block(index, last)
        *sums, in_flight = (self.run.tally[name].astype(np.float64) for name in TALLY_NAMES)
        self.work += Work(self.work.kernel, np.array(sums) * stands_for, in_flight)
        return counted

    def _count(self, index: tuple[int, ...]) -> None:
        counted = self.counters[index] = self._run(index, self.alike)
        cycles = (float(counted.cycles[0]), float(counted.cycles[1]))
        issue = counted.issued / SCHEDULERS
        busy = _busy(self.run.program.kernel, self.run.tally["issued"], counted)
        self.blocks.append(BlockCount(self.alike, cycles, issue, busy))

    def _count_folds(self) -> tuple[float, float]:
        """Runs one block of each job again, as the last of those that count themselves."""
        jobs = {
            counted.atomic_address: index
            for index, counted in self.counters.items()
            if counted.atomic_address
        }
        longest = [0.0, 0.0]
        for index in jobs.values():
            folded, plain = self._run(index, 1.0, last=True), self.counters[index]
            for k in (0, 1):
                longest[k] = max(longest[k], folded.cycles[k] - plain.cycles[k])
        return longest[0], longest[1]

    def _distinct(self, kind: int) -> float:
        """Computes the bytes of all blocks, each counted once, from those of each column."""
        seen = [sectors[kind] for sectors in self.sectors]
        new = [after - before for before, after in pairwise(seen)]
        # What the first column shares with others, a matrix or taps, all of them share.
        own = [new[0] if new else seen[0], *new]
        shared = seen[0] - own[0]
        rows = self.run.shape.grid[1] * self.run.shape.grid[2] / len(self.rows)
        columns = self.run.shape.grid[0] / len(self.columns)
        return (shared + sum(own) * columns) * rows * SECTOR


def _spread(items: Sequence[_T], most: int) -> list[_T]:
    """Picks at most so many, evenly spread, the middle ones of their neighbours."""
    count = min(most, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def _busy(kernel: Kernel, issued: NDArray[np.uint64], counted: Counters) -> float:
    """Returns the cycles for which the busiest pipe of a multiprocessor is taken."""
    busiest = float((issued.astype(np.float64) @ _pipe_use(kernel)).max()) / SCHEDULERS
    # Passes through the banks of shared memory and lines of global memory: one pipe for all four.
    return max(busiest, counted.shared_wavefronts + counted.global_wavefronts)


@lru_cache
def _pipe_use(kernel: Kernel) -> NDArray[np.float64]:
    """Returns the cycles that each instruction takes of each pipe of its scheduler."""
    names = sorted({name for name, _ in _PIPES.values()})
    use = np.zeros((len(kernel.instructions), len(names)))
    for row, instruction in zip(use, kernel.instructions):
        pipe = _PIPES.get(instruction.name) or _PIPES.get(instruction.pipe)
        if pipe is not None:
            row[names.index(pipe[0])] = pipe[1]
    return use
