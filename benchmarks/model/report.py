"""Prints what the model counts: budgets, times kernel by kernel, functions of a kernel."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from fastnas.benchmarks.model.budgets import Figure
from fastnas.benchmarks.model.counting import Work
from fastnas.benchmarks.model.functions import functions_of
from fastnas.benchmarks.model.recorded import TERMS
from fastnas.benchmarks.model.timing import Time, total

Times = Mapping[str, Time]
"""The time of all launches of each kernel."""


def budget_lines(figures: Iterable[Figure]) -> Iterator[str]:
    """Writes a Markdown table of figures, and by how much they keep to their bounds."""
    yield "| part | kernel | mixed op of | figure | value | bound | |"
    yield "|---|---|---|---|---|---|---|"
    for each in figures:
        shape, verdict = "x".join(map(str, each.shape)), "" if each.holds else "MISSED"
        cells = (each.part, f"`{each.kernel}`", shape, each.bound.name, f"{each.value:.3g}")
        yield f"| {' | '.join(cells)} | {each.bound} | {verdict} |"


def time_lines(times: Times, measured: Mapping[str, float] | None = None) -> Iterator[str]:
    """Writes a Markdown table in ms, the longest kernel first; beside it a profile, if given.

    What else the profile has, torch's kernels, the model leaves out: they have a line of their own.
    """
    head = ["kernel", *TERMS, *(["measured"] if measured else [])]
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    rows = sorted(times.items(), key=lambda row: -row[1].total)
    for name, time in [*rows, ("all", total(times.values()))]:
        cells = [f"`{name}`", f"{time.launches}", *(f"{us / 1e3:.2f}" for us in time.terms[1:])]
        if measured:
            ours = sum(us for kernel, us in measured.items() if kernel in times)
            found = ours if name == "all" else measured.get(name)
            cells.append("" if found is None else f"{found / 1e3:.2f}")
        yield f"| {' | '.join(cells)} |"
    if measured:
        rest = sum(us for kernel, us in measured.items() if kernel not in times)
        yield f"| others {'| ' * len(TERMS)}| {rest / 1e3:.2f} |"


def read_profile(path: Path) -> dict[str, dict[str, float]]:
    """Reads us by case and kernel from a CSV that `fastnas.benchmarks.profile` wrote."""
    found: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            us = float(row["calls"]) * float(row["us"])
            found[row["case"]][short_name(row["kernel"])] += us
    return {case: dict(kernels) for case, kernels in found.items()}


def short_name(kernel: str) -> str:
    """Returns a kernel's name without namespaces, return type, templates and parameters."""
    name = kernel.replace("(anonymous namespace)::", "").removeprefix("void ").split("(")[0]
    return name.split("<")[0].split("::")[-1]


def function_lines(work: Work) -> Iterator[str]:
    """Writes which share of a kernel's instructions the functions of its source have."""
    issued: defaultdict[str, float] = defaultdict(float)
    ffma: defaultdict[str, float] = defaultdict(float)
    cycles: defaultdict[str, float] = defaultdict(float)
    for instruction, count, spent in zip(work.kernel.instructions, work.issued, work.cycles):
        for name in set(functions_of(instruction)):
            issued[name] += count
            ffma[name] += count * (instruction.pipe in ("FFMA", "HMMA"))
            cycles[name] += spent
    whole, way = work.issued.sum(), work.cycles.sum()
    yield "| function, with what was inlined | % of cycles | % of instructions | % FFMA of it |"
    yield "|---|---|---|---|"
    for name, spent in sorted(cycles.items(), key=lambda row: -row[1]):
        if issued[name] >= whole / 1000:
            shares = (spent / way, issued[name] / whole, ffma[name] / issued[name])
            yield f"| `{name}` | {' | '.join(f'{100 * share:.1f}' for share in shares)} |"


def time_rows(case: str, times: Times) -> Iterator[Sequence[object]]:
    """Lists rows that `read_times` reads."""
    for kernel, time in times.items():
        yield (case, kernel, time.launches, *(f"{us:.1f}" for us in time.terms[1:]))


def case_lines(cases: Mapping[str, Times], old: Mapping[str, Times]) -> Iterator[str]:
    """Writes a Markdown table of whole cases in ms, beside those of the old structure."""
    yield "| case | launches | latency | issue | bytes | total, ms | at 800fa34: launches | total |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, times in cases.items():
        time, before = total(times.values()), total(old.get(name, {}).values())
        cells = [f"{us / 1e3:.2f}" for us in (time.latency, time.issue, time.bytes, time.total)]
        then = f"{before.launches} | {before.total / 1e3:.2f}" if before.launches else " | "
        yield f"| {name} | {time.launches} | {' | '.join(cells)} | {then} |"
