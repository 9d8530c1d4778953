"""Profiles which kernels a call runs on the GPU, how often, and how long each takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

WARMUP = 3


class Kernel(NamedTuple):
    """Says how often a call runs a kernel, and for how many microseconds."""

    name: str
    calls: float
    us: float
    """The mean: times `calls` it is the whole time, also of launches of several sizes."""
    median_us: float


def profiled(call: Callable[[], object], calls: int) -> list[Kernel]:
    """Lists the kernels of one call, the most expensive first; it is made `calls` times."""
    for _ in range(WARMUP):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            call()
        # What is still running when the profiler stops is not in its list.
        torch.cuda.synchronize()
    return kernels(profiler.events(), calls)


def kernels(events: Iterable[Any], calls: int) -> list[Kernel]:
    """Sorts kernels by the time that they take together; `events` are those of `calls` calls."""
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        # The profiler also lists the host's launches, which are no kernels.
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name].append(event.device_time)
    found = [Kernel(name, len(t) / calls, fmean(t), median(t)) for name, t in times.items()]
    return sorted(found, key=lambda kernel: -kernel.calls * kernel.us)
