"""Measures what a network costs: multiply-adds, parameters, and the latency of one image."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from fastnas.nn.eval_network import count_parameters

WARM_UPS, REPEATS, SECONDS = 3, 30, 1.0
"""Of a latency: passes before it, and the most passes and seconds of it (at least 5 passes)."""


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def multiply_adds(run: Callable[[], object]) -> int:
    """Counts the multiply-adds of convolutions and matrix products in what `run` computes.

    It is half of what `torch.utils.flop_counter` finds, fused ops included. Norms, activations,
    pools and sums do not count, as in the tables of DARTS and its successors.
    """
    from torch.utils.flop_counter import FlopCounterMode  # it imports Triton, which takes 0.4 s

    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops()) // 2


def count_macs(network: nn.Module, image: Sequence[int]) -> int:
    """Counts the multiply-adds of a network in evaluation mode on one image [C, H, W].

    They are followed on the device "meta", which computes nothing, through a copy.
    """
    found = copy.deepcopy(network).to("meta").eval()
    with torch.no_grad():
        x = torch.empty(1, *image, device="meta")
        return multiply_adds(lambda: found(x))


def latency_ms(
    run: Callable[[], object],
    device: torch.device,
    repeats: int = REPEATS,
    seconds: float = SECONDS,
) -> float:
    """Returns the median time of `run` in milliseconds, with the threads that torch has now.

    The device is waited for before and after each pass. The first three are not counted, and no
    more are made once they have taken `seconds`, but at least five.
    """
    times: list[float] = []
    begun = perf_counter()
    for turn in range(WARM_UPS + repeats):
        synchronise(device)
        start = perf_counter()
        run()
        synchronise(device)
        end = perf_counter()
        if turn >= WARM_UPS:
            times.append(end - start)
        if len(times) >= 5 and end - begun > seconds:
            break
    return 1e3 * median(times)


def network_cost(
    network: nn.Module,
    image: Sequence[int],
    autocast: AbstractContextManager[Any] | None = None,
) -> dict[str, Any]:
    """Returns what a network costs on one image [C, H, W] in evaluation mode, where it is.

    Args:
        autocast: context of the passes that are timed.

    Returns:
        macs: as `count_macs`.
        parameters: without the auxiliary head, as papers count them.
        latency_ms: as `latency_ms`.
        latency_threads: that torch had on the CPU while it was timed.
    """
    device = next(network.parameters()).device
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    # Its own generator: what is timed must not move the run's random numbers.
    noise = torch.Generator().manual_seed(0)
    x = torch.rand(1, *image, generator=noise).to(device)
    try:
        with torch.no_grad(), autocast or nullcontext():
            latency = latency_ms(lambda: network(x), device)
    finally:
        for module, mode in modes:
            module.training = mode
    return {
        "macs": count_macs(network, image),
        "parameters": count_parameters(network),
        "latency_ms": latency,
        "latency_threads": torch.get_num_threads(),
    }


def spent(
    run: Callable[[], object], modules: Sequence[nn.Module], reading: Callable[[], float]
) -> tuple[list[float], float]:
    """Returns by how much a reading rises in each module while `run` runs, and in all of it.

    Args:
        modules: whose forward counts, all of its calls together.
        reading: a clock, or a counter.
    """
    found = [0.0] * len(modules)

    def begins(i: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            found[i] -= reading()

        return hook

    def ends(i: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            found[i] += reading()

        return hook

    hooks = []
    for i, module in enumerate(modules):
        hooks.append(module.register_forward_pre_hook(begins(i)))
        hooks.append(module.register_forward_hook(ends(i)))
    try:
        start = reading()
        run()
        return found, reading() - start
    finally:
        for hook in hooks:
            hook.remove()


def clock(device: torch.device) -> Callable[[], float]:
    """Returns a clock in milliseconds that waits for the device."""

    def reading() -> float:
        synchronise(device)
        return 1e3 * perf_counter()

    return reading
