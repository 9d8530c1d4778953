"""Recording work on a device once, to run it again without Python: CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

Result = TypeVar("Result")
WARM_UPS = 3


class Recorder(Protocol):
    """What `GraphedBilevel` needs of CUDA graphs; the tests have one that runs on the CPU."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Runs `work` until all that it makes at its first call is made."""

    def record(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """Records `work` without running it.

        Returns:
            A function that runs the recording and returns the tensors that `work` returned, which
            are the same at every call: a call overwrites the results of the one before.

        Raises:
            RuntimeError: the work cannot be recorded.
        """


class CudaRecorder:
    """CUDA graphs in one memory pool, to be run on one stream in any order.

    The pool is shared because nothing in it outlives a replay but the results, which are held: a
    graph's intermediates may lie where another's lay.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()

    def warm_up(self, work: Callable[[], object]) -> None:
        """On the stream of the capture, so that cuBLAS' workspace there and Triton's kernels are
        made; three times, as torch's documentation has it."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                work()
        current.wait_stream(self._stream)

    def record(self, work: Callable[[], Result]) -> Callable[[], Result]:
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self.device),
            # Puts the stream back; torch.cuda.graph does not where the capture fails.
            torch.cuda.stream(torch.cuda.current_stream(self.device)),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream),
        ):
            result = work()

        def replay() -> Result:
            graph.replay()
            return result

        return replay
