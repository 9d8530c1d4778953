"""Writes the six rows and the picture with which README.md opens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastnas.benchmarks.harness.page_tables import (
    BASELINES,
    case_name,
    conditions,
    ratio,
    saved_share,
)
from fastnas.benchmarks.harness.schema import Row, by_case, speedup
from fastnas.benchmarks.harness.verify import EAGER

COMPARED = (EAGER, "eager-best", "compile")


class Line(NamedTuple):
    """Describes a row of the table: its label, and the case and provider that it shows."""

    label: str
    op: str
    provider: str


LINES = (
    Line("search step, `SearchNetwork` of fastnas", "search_step", "fastnas"),
    Line('the same with `memory="minimal"`', "search_step", "fastnas-minimal"),
    Line("the same, public DARTS code after `accelerate`", "search_step", "fastnas-accelerated"),
    Line("one normal cell, forward and backward", "mixed_edges normal cell", "fastnas-cpu"),
    Line("the weighted sum alone, forward and backward", "mixed_sum", "fastnas-cpu"),
)
"""The sixth is the slowest of all rows beside a baseline, whichever it is."""

BARS = {
    EAGER: "eager (public DARTS code)",
    "eager-best": "best eager (channels last)",
    "compile": "torch.compile",
    "fastnas-accelerated": "the public code, accelerated",
    "fastnas-fast": 'fastnas, memory="fast"',
    "fastnas": 'fastnas, memory="lean"',
    "fastnas-minimal": 'fastnas, memory="minimal"',
}
OURS, THEIRS = "#0072B2", "#999999"

Providers = Mapping[str, Row]


def headline(rows: Sequence[Row]) -> str:
    """Returns the table of six rows as Markdown.

    Raises:
        ValueError: a case that it shows was not measured.
    """
    cases = list(by_case(rows).values())
    shown = [(line.label, *_found(cases, line)) for line in LINES]
    # The row that does worst is shown whatever it is, so that the table cannot be a selection.
    slowest = min(_timed(cases), key=lambda pair: _worst(*pair))
    shown.append((f"the slowest of all: {case_name(slowest[0])}", *slowest))
    lines = [
        "| what runs | x eager | x best eager | x torch.compile | memory kept, of eager's |",
        "|---|---:|---:|---:|---:|",
    ]
    for label, row, providers in shown:
        cells = [label, *(ratio(row, providers.get(name)) for name in COMPARED)]
        cells.append(saved_share(row, providers.get(EAGER)))
        lines.append(f"| {' | '.join(cells)} |")
    step = shown[0][1]
    notes = (
        "How many times faster; **bold: slower**; empty: not measured. The step is that of the"
        f" DARTS supernet ({step.op.partition(' ')[2]}, {step.shape}, {step.dtype})."
        f" {conditions(step)}."
    )
    return "\n".join([*lines, "", notes])


def _found(cases: Sequence[Providers], line: Line) -> tuple[Row, Providers]:
    """Finds the first timed case of that op, of the whole step or of both passes."""
    for providers in cases:
        row = providers.get(line.provider)
        if row is None or row.median_ms is None or row.pass_ not in ("step", "fwd+bwd"):
            continue
        # The op of a step or a mixed op goes on with its size: "search_step S0 C16 L8".
        if row.op == line.op or row.op.startswith(f"{line.op} "):
            return row, providers
    raise ValueError(f"no row of {line.op} by {line.provider}, which README.md shows")


def _timed(cases: Sequence[Providers]) -> list[tuple[Row, Providers]]:
    """Lists all rows of ours that have a time beside a baseline."""
    ours = ((row, providers) for providers in cases for row in providers.values())
    return [
        (row, providers)
        for row, providers in ours
        if row.is_fastnas and any(speedup(row, providers.get(name)) for name in BASELINES)
    ]


def _worst(row: Row, providers: Providers) -> float:
    ratios = (speedup(row, providers.get(name)) for name in BASELINES)
    return min(times for times in ratios if times is not None)


def step_figure(rows: Sequence[Row]) -> Figure:
    """Draws the time of a search step and the memory that it keeps, a bar for each provider.

    Raises:
        ValueError: no search step was measured.
    """
    steps = {row.backend: row for row in rows if row.suite == "search" and row.median_ms}
    shown = [steps[name] for name in BARS if name in steps]
    if not shown:
        raise ValueError("no row is a search step, which the picture of README.md shows")
    figure = Figure(figsize=(10, 0.9 + 0.36 * len(shown)), layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True)
    time.invert_yaxis()
    _bars(time, shown, [(row.median_ms or 0) / 1e3 for row in shown], "s")
    _bars(memory, shown, [(row.saved_bytes or 0) / 2**30 for row in shown], "GiB")
    time.set_yticks(range(len(shown)), [BARS[row.backend] for row in shown])
    time.set_title("seconds of a search step", fontsize=10)
    memory.set_title("GiB kept for the backward pass", fontsize=10)
    figure.supxlabel(f"{shown[0].op}, {shown[0].shape}; {conditions(shown[0])}", fontsize=7)
    return figure


def _bars(axes: Axes, rows: Sequence[Row], values: Sequence[float], unit: str) -> None:
    colours = [OURS if row.is_fastnas else THEIRS for row in rows]
    bars = axes.barh(range(len(rows)), values, color=colours, height=0.7)
    axes.bar_label(bars, [f"{value:.3g} {unit}" for value in values], padding=3, fontsize=8)
    # This leaves room for the numbers behind the bars.
    axes.set_xlim(0, 1.18 * max(values))
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(axis="x", bottom=False, labelbottom=False)
    axes.tick_params(axis="y", left=False)
