"""Counts how much of what a network asks of its candidates runs fused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import nn

from fastnas.dropin import Report


class Share(NamedTuple):
    """Holds the calls of one step that ran fused, of those that were asked for.

    Args:
        reasons: why others ran by their own modules, and how often.
    """

    fused: int
    asked: int
    reasons: dict[str, int]

    @property
    def share(self) -> float:
        return self.fused / self.asked


def calls_of(modules: Iterable[nn.Module], step: Callable[[], object]) -> int:
    """Counts the calls of the modules in one step of a network that runs by itself."""
    count = 0

    def counts(*_: object) -> None:
        nonlocal count
        count += 1

    # A hook makes a module run by itself, so this must not be an accelerated network.
    handles = [m.register_forward_hook(counts) for m in dict.fromkeys(modules)]
    try:
        step()
    finally:
        for handle in handles:
            handle.remove()
    return count


def fused_share(report: Report, step: Callable[[], object], asked: int) -> Share:
    """Reads from the report of `accelerate` how many calls of one step ran fused.

    Args:
        asked: how many calls of candidates the network's own forward makes in that step.
    """
    report.calls.clear()
    step()
    return Share(report.calls.served, asked, dict(report.calls.reasons))
