"""Captures any work on a GPU as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

WARMUP = 3


class Captured(NamedTuple):
    """Holds the replay of what was captured, and the most device memory that it adds."""

    replay: Callable[[], None]
    peak_bytes: int


def captured(call: Callable[[], object], warmup: int = WARMUP) -> Captured:
    """Runs `call` a few times on a stream of its own, then captures it once.

    The warm-up creates what must outlive the graph: optimizer states, cuDNN's and cuBLAS' plans,
    compiled kernels. All graphs take their memory from one pool, so only one may replay at a time,
    and what a replay leaves in the pool lasts until another graph replays.

    Raises:
        RuntimeError: `call` does what a graph cannot hold (waits for the device, for instance).
    """
    stream = torch.cuda.Stream()
    # What was queued before must have run when the warm-up reads it.
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    # Only what the capture allocates counts: the warm-up's memory is not the graph's.
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    graph = torch.cuda.CUDAGraph()
    # One pool serves all: with pools of their own the memory of captured steps would add up.
    with torch.cuda.graph(graph, pool=_holder().pool()):
        call()
    return Captured(graph.replay, torch.cuda.max_memory_allocated() - before)


@cache
def _holder() -> torch.cuda.CUDAGraph:
    """Captures next to nothing to hold the pool, also when the first real capture in it fails."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.zeros(1, device="cuda")
    return graph
