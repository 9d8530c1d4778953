"""Turns counts of launches into times on an H100. They are a model's: nothing is measured."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastnas.benchmarks.model.counting import LaunchCount


@dataclass(frozen=True)
class Gpu:
    """Describes the GPU of the model: an H100 SXM.

    Attributes:
        launch_us: from the end of a kernel to the first instruction of the next, in a graph.
        memory, l2: bytes a microsecond.
        l2_bytes: what a launch reads comes from L2 if it is at most so much.
    """

    multiprocessors: int = 132
    mhz: float = 1755.0
    registers: int = 65536
    shared: int = 227 * 1024
    most_threads: int = 2048
    most_blocks: int = 32
    launch_us: float = 2.0
    memory: float = 3.0e6
    l2: float = 5.5e6
    l2_bytes: float = 40e6


H100 = Gpu()


@dataclass(frozen=True)
class Time:
    """Holds the microseconds of a launch, or of several: the longest of the terms, and the launch.

    Attributes:
        latency: warps wait for what they have asked for, or for their turn.
        issue: instructions, on all multiprocessors evenly.
        busy: the busiest pipe, likewise.
        bytes: of memory, or between L2 and the multiprocessors.
    """

    launches: int = 0
    total: float = 0.0
    latency: float = 0.0
    issue: float = 0.0
    busy: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Time) -> Time:
        launches, *terms = (a + b for a, b in zip(self.terms, other.terms))
        return Time(int(launches), *terms)

    def times(self, count: int) -> Time:
        launches, *terms = self.terms
        return Time(int(launches) * count, *(term * count for term in terms))

    @property
    def terms(self) -> tuple[int, float, float, float, float, float]:
        return self.launches, self.total, self.latency, self.issue, self.busy, self.bytes


def occupancy(count: LaunchCount, gpu: Gpu = H100) -> int:
    """Returns how many blocks of a launch fit on a multiprocessor."""
    # Registers are given out by eight for each thread, by whole warps.
    registers = -(-count.kernel.registers // 8) * 8 * -(-count.threads // 32) * 32
    shared = -(-max(count.shared, 1) // 1024) * 1024
    fits = (gpu.registers // registers, gpu.shared // shared, gpu.most_threads // count.threads)
    return max(1, min(*fits, gpu.most_blocks))


def time_of(count: LaunchCount, gpu: Gpu = H100) -> Time:
    """Computes the time of a launch that has the GPU to itself."""
    beyond = int(count.read > gpu.l2_bytes)  # which of the two latencies is that of its loads
    blocks = sum(block.blocks for block in count.blocks)
    resident = min(occupancy(count, gpu), math.ceil(blocks / gpu.multiprocessors))
    durations = [
        (max(block.cycles[beyond], resident * block.issue), block.blocks) for block in count.blocks
    ]
    cycles = _makespan(durations, gpu.multiprocessors * resident) + count.fold_cycles[beyond]
    issue = sum(block.blocks * block.issue for block in count.blocks) / gpu.multiprocessors
    busy = sum(block.blocks * block.busy for block in count.blocks) / gpu.multiprocessors
    moved = max((count.read + count.written) / gpu.memory, count.moved / gpu.l2)
    terms = (cycles / gpu.mhz, issue / gpu.mhz, busy / gpu.mhz, moved)
    return Time(1, max(terms) + gpu.launch_us, *terms)


def _makespan(durations: Sequence[tuple[float, float]], slots: int) -> float:
    """Returns when the last block ends, if each begins where the first place is free."""
    blocks = sum(count for _, count in durations)
    work = sum(duration * count for duration, count in durations)
    if blocks > 4 * slots:  # many waves: the last one is filled on the average by half
        return work / slots + max(duration for duration, _ in durations) / 2
    ends = [0.0] * slots
    # A counted block may stand for a part of one more: what is left of it goes to the next.
    due, begun = 0.0, 0
    for duration, count in durations:
        due += count
        while begun < round(due):
            heapq.heapreplace(ends, ends[0] + duration)
            begun += 1
    return max(ends)


def total(times: Iterable[Time]) -> Time:
    """Adds up launches that run one after the other."""
    return sum(times, Time())
