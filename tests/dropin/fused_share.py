"""How much of what a network asks of its candidates ran fused: read from the report's counts."""

from __future__ import annotations

from collections.abc import Callable

from fastnas.dropin import Report


def fused_share(
    report: Report, step: Callable[[], object], asked: int
) -> tuple[float, dict[str, int]]:
    """The share of the candidates' calls in one step that ran fused, and why others did not.

    Args:
        asked: how many calls of candidates the network's own forward makes in that step.
    """
    report.calls.clear()
    step()
    return report.calls.served / asked, dict(report.calls.reasons)
