"""Counts what an accelerated network really ran: candidates fused, or by their own forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass
class Tally:
    """Counts calls of candidates since `accelerate`, or since `clear`; printed, it is a table.

    Of a cell that ran fused as a whole, each candidate is a call. Calls in compiled code, which no
    Python follows, and those of candidates that were never recognised are not counted; the latter
    stand in `Report.left`.
    """

    fused: Counter[str] = field(default_factory=Counter)
    """Name of a module to its calls that ran fused."""
    own: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Name of a module, and reason, to calls that ran its own forward."""

    @property
    def total(self) -> int:
        """Counts all calls."""
        return self.fused.total() + self.own.total()

    @property
    def share(self) -> float:
        """Returns the share of the calls that ran fused; 0 before the first call."""
        return self.fused.total() / self.total if self.total else 0.0

    def clear(self) -> None:
        self.fused.clear()
        self.own.clear()

    def __deepcopy__(self, _: object) -> Tally:
        # Copies of a network, as a checkpoint or an average makes, count where the original does.
        return self

    def __str__(self) -> str:
        fused, percent = self.fused.total(), 100 * self.share
        head = f"{fused} of {self.total} calls of candidates ran fused ({percent:.0f} %)"
        rows = [(name, f"own forward, {n} times: {why}") for (name, why), n in self.own.items()]
        return "\n".join([head, *grouped(rows)])


class Site(NamedTuple):
    """Names a module for a tally."""

    name: str
    tally: Tally

    def ran_fused(self, candidates: int = 1) -> None:
        self.tally.fused[self.name] += candidates

    def ran_own(self, reason: str) -> None:
        self.tally.own[self.name, reason] += 1


def grouped(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yields a line for each text, with the first and last of the names that share it."""
    names: dict[str, list[str]] = {}
    for name, text in rows:
        # Names come in the order of the network, so the first and the last tell the range.
        names.setdefault(text, []).append(name)
    labels = {
        text: group[0] if len(group) == 1 else f"{group[0]} .. {group[-1]} ({len(group)})"
        for text, group in names.items()
    }
    width = max(map(len, labels.values()), default=0)
    return (f"  {label:<{width}}  {text}" for text, label in labels.items())
