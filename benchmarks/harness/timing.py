"""Times all providers alike: one process, one loop, random orders."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

# It is several times the L2 of the largest GPU: 50 MB on an H100.
FLUSH_BYTES = 1 << 28

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Holds quantiles over the repeats, in milliseconds."""

    median_ms: float
    p20_ms: float
    p80_ms: float

    @classmethod
    def of(cls, milliseconds: list[float]) -> Timing:
        p20, median, p80 = np.percentile(milliseconds, [20, 50, 80])
        return cls(float(median), float(p20), float(p80))


@dataclass(frozen=True)
class Roof:
    """Holds what a device does at most, as measured in this run; None where it was not.

    Attributes:
        bandwidth: bytes per second of a copy, read and written.
        fma_rate: fp32 multiply-adds per second.
    """

    bandwidth: float | None = None
    fma_rate: float | None = None


def measure(
    providers: Mapping[str, Call], *, repeats: int, warmup: int, device: str, drain: bool = False
) -> dict[str, Timing]:
    """Times the providers in turn, each round in another order, so that drift hits all alike.

    Orders are random, the same in every run, and none follows itself, its caches still warm.

    On a GPU by CUDA events around each call, with the L2 cache overwritten before it; on a CPU by
    the wall clock, with the caches as the provider before left them.

    Args:
        providers: name to a call without arguments.
        repeats: timed rounds, at least 1.
        warmup: rounds before them, in the same orders.
        device: "cpu" or "cuda".
        drain: on a GPU, wait for it before each call. What has thousands of launches is then timed
            with them; else the host is up to a thousand launches ahead when the clock starts.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; at least 1 is needed")
    clock = _cuda_clock(drain) if device == "cuda" else _cpu_clock
    times: dict[str, list[Callable[[], float]]] = {name: [] for name in providers}
    with _no_garbage_collection():
        for turn, order in zip(range(-warmup, repeats), _orders(list(providers))):
            for name in order:
                elapsed = clock(providers[name])
                if turn >= 0:
                    times[name].append(elapsed)
    if device == "cuda":
        torch.cuda.synchronize()
    return {name: Timing.of([read() for read in taken]) for name, taken in times.items()}


def _orders(names: list[str]) -> Iterator[list[str]]:
    generator, before = random.Random(0), names[:0]
    while True:
        order = generator.sample(names, len(names))
        # The one that ran last would be the first again, with its own data in the caches.
        if order[:1] == before:
            order.reverse()
        before = order[-1:]
        yield order


def _cpu_clock(call: Call) -> Callable[[], float]:
    start = perf_counter()
    call()
    milliseconds = (perf_counter() - start) * 1e3
    return lambda: milliseconds


def _cuda_clock(drain: bool) -> Callable[[Call], Callable[[], float]]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def clock(call: Call) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The inputs of the call before must not be in L2 still.
        flush.zero_()
        if drain:
            torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        # The time is read after all rounds: reading it waits for the device.
        return lambda: start.elapsed_time(end)

    return clock


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    # A collection in the middle of a call would count as its time.
    was_on = gc.isenabled()
    # What is garbage by now is collected before the first call, not in the middle of one.
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
