"""Counts what a launch does: some of its blocks run on the machine and stand for the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from fastnas.benchmarks.model.machine import Counters, Program, Run, Shape
from fastnas.benchmarks.model.sass import Kernel

SECTOR = 32
FEW_BLOCKS = 48
"""A grid of so few blocks is run whole."""
MOST_ROWS = 96
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
class LaunchCount:
    """Counts a whole launch.

    Attributes:
        fold_cycles: what the last block of each job adds to its own way, if blocks count arrivals.
        read, written: bytes that differ.
        moved: bytes between L2 and the multiprocessors.
        executed: of each instruction, how often warps issued it.
    """

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    registers: int
    shared: int
    blocks: tuple[BlockCount, ...]
    fold_cycles: tuple[float, float]
    read: float
    written: float
    moved: float
    executed: NDArray[np.float64]


def count_launch(program: Program, shape: Shape) -> LaunchCount:
    """Runs blocks of a launch and counts it; the memory of the process stays as it is."""
    run = Run(program, shape)
    try:
        return _counted(run)
    finally:
        run.close()


def _counted(run: Run) -> LaunchCount:
    program, (x, y, z) = run.program, run.shape.grid
    columns, rows = _sample(run.shape.grid)
    scale = y * z / len(rows)
    found: list[BlockCount] = []
    executed = np.zeros(len(run.executed))
    seen: list[tuple[int, int]] = []  # sectors read and written after each column
    counters: dict[tuple[int, ...], Counters] = {}
    moved = 0.0
    for column, alike in columns:
        for row in rows:
            before = run.executed.astype(np.float64)
            index = (column, *row)
            counted = counters[index] = run.block(index)
            own = run.executed - before
            executed += own * alike * scale
            moved += (counted.load_sectors + counted.store_sectors) * alike * scale * SECTOR
            cycles = (float(counted.cycles[0]), float(counted.cycles[1]))
            issue, busy = counted.issued / SCHEDULERS, _busy(program, own, counted)
            found.append(BlockCount(alike * scale, cycles, issue, busy))
        seen.append(run.sectors())
    read, written = (_distinct([s[k] for s in seen], columns, x) * scale for k in (0, 1))
    return LaunchCount(
        kernel=program.kernel.name, grid=run.shape.grid,
        threads=int(np.prod(run.shape.block)), registers=program.kernel.registers,
        shared=program.kernel.shared + run.shape.dynamic_shared, blocks=tuple(found),
        fold_cycles=_folds(run, counters), read=read * SECTOR, written=written * SECTOR,
        moved=moved, executed=executed,
    )  # fmt: skip


def _sample(
    grid: tuple[int, int, int],
) -> tuple[list[tuple[int, float]], list[tuple[int, int]]]:
    """Picks columns (blockIdx.x, with how many are alike) and rows (blockIdx.y and z)."""
    x, y, z = grid
    rows = list(product(range(y), range(z)))
    if len(rows) > MOST_ROWS:
        rows = [rows[i] for i in np.linspace(0, len(rows) - 1, MOST_ROWS).astype(int)]
    if x * len(rows) <= FEW_BLOCKS or x <= 2:
        return [(column, 1.0) for column in range(x)], rows
    # Two that lie apart: what both read, taps or a matrix, all blocks share.
    return [(x // 3, x / 2), (2 * x // 3, x / 2)], rows


def _distinct(seen: list[int], columns: list[tuple[int, float]], x: int) -> float:
    """Computes the sectors of all columns from those of the ones that ran, in turn."""
    if len(columns) == x:
        return seen[-1]
    common = max(0, 2 * seen[0] - seen[1])
    return common + x * (seen[0] - common)


def _folds(run: Run, counters: Mapping[tuple[int, ...], Counters]) -> tuple[float, float]:
    """Runs the last block of each job again, as the one that has counted all others."""
    sharing: Counter[int] = Counter()
    last: dict[int, tuple[int, ...]] = {}
    first_column = min(index[0] for index in counters)
    for index, counted in counters.items():
        if counted.atomic_address:
            last[counted.atomic_address] = index
            sharing[counted.atomic_address] += index[0] == first_column
    longest = [0.0, 0.0]
    for address, index in last.items():
        folded = run.block(index, arrivals=sharing[address] * run.shape.grid[0])
        for k in (0, 1):
            longest[k] = max(longest[k], folded.cycles[k] - counters[index].cycles[k])
    return longest[0], longest[1]


def _busy(program: Program, executed: NDArray[np.float64], counted: Counters) -> float:
    """Returns the cycles for which the busiest pipe of a multiprocessor is taken."""
    busiest: float = (executed @ _pipe_use(program.kernel)).max() / SCHEDULERS
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
