"""Times the search step of a run beside the eager step of the public code, on the same machine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastnas import reference
from fastnas.nn import SEARCH_NETWORKS, ArchParameters, SearchNetwork
from fastnas.reference.amp import Amp
from fastnas.runs.eager_memory import why_eager_does_not_fit
from fastnas.saved_bytes import saved_bytes
from fastnas.search.bilevel import Bilevel
from fastnas.search.build import in_channels_last
from fastnas.search.cuda_graph import GraphedBilevel
from fastnas.search.optimizers import adam, capturable_on, sgd
from fastnas.search.searcher import Searcher
from fastnas.strategies.mixture import Mixture
from fastnas.strategies.precision import Precision
from fastnas.strategies.steps import Batch

logger = logging.getLogger("fastnas")

Step = Callable[[], None]


def comparison(searcher: Searcher, steps: int) -> dict[str, Any]:
    """Returns what a report says of this run beside eager, whatever becomes of the comparison.

    Eager may need more memory than there is, which is what many come here for. So its bytes are
    estimated first; and a comparison that fails costs its figures, not the run.

    Returns:
        As `compare_with_eager`, or `uncompared` with the reason.
    """
    return compared_if_it_fits(
        lambda: why_eager_does_not_fit(searcher), lambda: compare_with_eager(searcher, steps)
    )


def compared_if_it_fits(
    why_not: Callable[[], str | None], compare: Callable[[], dict[str, float]]
) -> dict[str, Any]:
    """Returns what `compare` does, or `uncompared` where it would not fit, or fails.

    Args:
        why_not: says why eager does not fit into the free memory.
    """
    try:
        reason = why_not()
        if reason is None:
            return {**compare(), "not_compared": None}
    # torch raises a RuntimeError where a device has no memory left, and its CPU allocator does too.
    except (RuntimeError, MemoryError, ValueError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        reason = f"the comparison failed: {text}"
    logger.warning("fastnas: not compared with eager: %s", reason)
    return uncompared(reason)


def uncompared(reason: str | None) -> dict[str, Any]:
    """Returns the figures of a report without a comparison; None where none was wanted."""
    return {
        "step_speedup_vs_eager": None,
        "saved_bytes_ratio_vs_eager": None,
        "not_compared": reason,
    }


def compare_with_eager(searcher: Searcher, steps: int) -> dict[str, float]:
    """Times first-order steps, this run's and eager's in turn, on copies of the run's networks.

    Ours is timed from CUDA graphs where the run uses them. Eager is the method's `eager_step`:
    NCHW, all gradients in both halves, skip noise from torch's generator where the method has
    noise, sampled paths one after the other. Both share sizes, batches, threads and precision.
    Saved bytes are the most that autograd holds for backward at any moment of a step, params,
    buffers and images excluded.

    Returns:
        step_seconds, eager_step_seconds (medians), step_speedup_vs_eager, saved_bytes,
        eager_saved_bytes, saved_bytes_ratio_vs_eager (eager over ours).
    """
    searcher.network.train()
    train = searcher.pipeline(searcher.train_stream)
    valid = searcher.pipeline(searcher.valid_stream)
    searcher.close()  # what reads ahead would take CPU time from what is timed
    layout = searcher.space.layout
    eager_kind = searcher.strategy.eager_networks[layout]
    networks = _copy(searcher, SEARCH_NETWORKS[layout]), _copy(searcher, eager_kind)
    ours, eager = _bilevel(searcher, networks[0]), _eager_step(searcher, networks[1], train, valid)
    sides = [
        # Without graphs: autograd saves when a step is captured, not when it is replayed.
        Side(_step(searcher.graphed(ours), train, valid), _step(ours, train, valid), networks[0]),
        Side(eager, eager, networks[1]),
    ]
    return beside(sides, [train[0], valid[0]], steps, searcher.device)


class Side(NamedTuple):
    """Holds what is compared.

    Attributes:
        timed: a step.
        weighed: one that does the same, of which the saved bytes are counted.
        network: whose parameters and buffers do not count.
    """

    timed: Step
    weighed: Step
    network: nn.Module


def beside(
    sides: Sequence[Side], given: Sequence[Tensor], steps: int, device: torch.device
) -> dict[str, float]:
    """Returns the figures of `compare_with_eager` of two sides, ours and eager.

    Args:
        given: tensors that do not count as saved.
    """
    seconds: list[list[float]] = [[], []]
    for turn in range(steps + 1):
        # Each goes first in every other turn: a neighbour of the machine that comes or goes then
        # slows both, and neither always finds the caches that the other has filled.
        for i in (0, 1) if turn % 2 else (1, 0):
            elapsed = _timed(sides[i].timed, device)
            if turn > 0:  # the first turn warms up
                seconds[i].append(elapsed)
    # What both hold alike would bring their ratio nearer to 1.
    saved = [
        saved_bytes(
            side.weighed, exclude=[*side.network.parameters(), *side.network.buffers(), *given]
        )
        for side in sides
    ]
    # One turn in which the system did something else must not decide, so the median is taken.
    ours, eager = map(median, seconds)
    return {
        "step_seconds": ours,
        "eager_step_seconds": eager,
        "step_speedup_vs_eager": eager / ours,
        "saved_bytes": saved[0],
        "eager_saved_bytes": saved[1],
        "saved_bytes_ratio_vs_eager": saved[1] / saved[0],
    }


def _bilevel(searcher: Searcher, network: reference.SearchNetwork) -> Bilevel:
    assert isinstance(network, SearchNetwork)
    if searcher.config.channels_last:
        in_channels_last(network)
    arch = deepcopy(searcher.arch)
    # It is a copy, because its order is changed below.
    strategy = copy(searcher.strategy)
    if isinstance(strategy, Mixture):
        # Eager makes a first-order step, so the unrolled one would be compared with less work.
        strategy.order = 1
    # Its scales are its own: the run's stay where they are.
    precision = Precision(searcher.config.precision, searcher.device)
    optimizers = _still_optimizers(network, arch)
    return Bilevel(network, arch, strategy, *optimizers, precision=precision)


def _step(bilevel: Bilevel | GraphedBilevel, train: Batch, valid: Batch) -> Step:
    def step() -> None:
        bilevel.arch_step(valid, train)
        bilevel.weight_step(train)

    return step


def _eager_step(
    searcher: Searcher, network: reference.SearchNetwork, train: Batch, valid: Batch
) -> Step:
    # The public code runs NCHW, whatever layout this run has.
    train, valid = (train[0].contiguous(), train[1]), (valid[0].contiguous(), valid[1])
    arch = deepcopy(searcher.arch)
    optimizers = _still_optimizers(network, arch)
    amp = Amp(searcher.precision.dtype, searcher.device)

    def step() -> None:
        searcher.strategy.eager_step(network, arch, optimizers, train, valid, amp)

    return step


def _still_optimizers(
    network: nn.Module, arch: ArchParameters
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Makes the optimizers of a search with rate 0, so that every timed step does the same work."""
    capturable = capturable_on(next(network.parameters()).device)
    params = sgd(
        network.parameters(), lr=0.0, capturable=capturable, momentum=0.9, weight_decay=3e-4
    )
    return params, adam(arch.parameters(), lr=0.0, capturable=capturable)


def _copy(searcher: Searcher, kind: type[reference.SearchNetwork]) -> reference.SearchNetwork:
    network = searcher.build(kind).to(searcher.device)
    # Both start from the weights that were found, as values may decide the speed of a kernel
    # (denormal ones do on a CPU).
    network.load_state_dict(searcher.network.state_dict())
    return network.train()


def _timed(step: Step, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    # Without the waits around it, the clock would tell how long it takes to queue the kernels.
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
