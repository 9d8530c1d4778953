"""Reads what `python -m fastnas.benchmarks.model record` wrote: no compiler is needed for it."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

from fastnas.benchmarks.model.timing import Time

KERNELS = Path(__file__).parent / "kernels.csv"
"""Of the kernels as they are; written anew where they change."""
OLD_STRUCTURE = Path(__file__).parent / "800fa34.csv"
"""Of the kernels of 800fa34, counted by the same machine."""
TERMS = ("launches", "total", "latency", "issue", "busy", "bytes")


def mixed_op_case(shape: tuple[int, ...]) -> str:
    return f"mixed op {'x'.join(map(str, shape))}"


def step_case(batch: int, dtype: str) -> str:
    return f"step {dtype} {batch}"


def recorded(path: Path = KERNELS) -> dict[str, dict[str, Time]]:
    """Reads times by case and kernel, in us."""
    found: defaultdict[str, dict[str, Time]] = defaultdict(dict)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            launches, *terms = (float(row[term]) for term in TERMS)
            found[row["case"]][row["kernel"]] = Time(int(launches), *terms)
    return dict(found)
