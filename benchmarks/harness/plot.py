"""Figures of a benchmark CSV, from nothing but the CSV."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastnas.benchmarks.harness.schema import PASSES, Row, by_case, read_csv, speedup
from fastnas.benchmarks.harness.verify import EAGER
from fastnas.report.figures import save_figure

COLOURS = {
    EAGER: "#7f7f7f",
    "eager-best": "#bcbd22",
    "compile": "#9467bd",
    "compile-max": "#c5b0d5",
    "checkpoint": "#8c564b",
}
FASTNAS_COLOURS = ("#1f77b4", "#17becf", "#2ca02c", "#aec7e8", "#98df8a")
LOSES = "//"
BAR_HEIGHT = 0.8
MIB = 2**20

Cases = dict[tuple[str, ...], dict[str, Row]]


def plot_csv(csv: Path, out: Path) -> list[Path]:
    """Draw a CSV: `<suite>-speedup.png` and `<suite>-memory.png` in the folder `out`.

    Speed-up is over eager, by case and pass, on a log axis; bars to the left of 1, hatched, are
    where a provider loses. Memory is what a forward saves, and the peak where it was measured.

    Returns:
        The files that were written.
    """
    rows = read_csv(csv)
    written = []
    for suite in dict.fromkeys(row.suite for row in rows):
        cases = by_case(row for row in rows if row.suite == suite)
        for kind, draw in (("speedup", _speedup_figure), ("memory", _memory_figure)):
            figure = draw(cases)
            if figure is None:
                continue
            figure.supxlabel(caption(rows), fontsize=7, color="#444444")
            path = out / f"{suite}-{kind}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_figure(figure, path)
            written.append(path)
    return written


def caption(rows: Sequence[Row]) -> str:
    """The conditions of the rows, wrapped to the width of a figure."""
    return textwrap.fill(conditions_sentence(rows), 130)


def conditions_sentence(rows: Sequence[Row]) -> str:
    """One sentence: device, threads, versions, commit, time."""
    row = rows[0]
    driver = f", driver {row.driver}" if row.driver else ""
    triton = f", Triton {row.triton}" if row.triton and row.driver else ""
    threads = "1 CPU thread" if row.threads == 1 else f"{row.threads} CPU threads"
    return (
        f"Measured on {row.device} with {threads}{driver}, torch {row.torch}{triton}, fastnas"
        f" {row.fastnas} at commit {row.commit}, {row.time[:10]}; medians, all providers in turn"
        " in one process, each verified against fp64 first."
    )


def case_label(row: Row) -> str:
    """What tells the cases of one pass apart."""
    layout = f" {row.layout}" if row.suite == "ops" and row.layout != "contiguous" else ""
    K = f" K={row.K}" if row.suite == "ops" else ""
    return f"{row.op} {row.dtype} {row.shape}{K}{layout}"


def _speedup_figure(cases: Cases) -> Figure | None:
    passes = [name for name in PASSES if any(case[2] == name for case in cases)]

    def ratio(row: Row, providers: Mapping[str, Row]) -> float | None:
        return None if row.backend == EAGER else speedup(row, providers.get(EAGER))

    return _bars(
        [
            (name, {case: rows for case, rows in cases.items() if case[2] == name}, ratio)
            for name in passes
        ],
        "times faster than eager",
        start=1.0,
    )


def _memory_figure(cases: Cases) -> Figure | None:
    # Memory does not depend on the pass: the last one stands for all.
    whole = {case: rows for case, rows in cases.items() if case[2] in ("fwd+bwd", "step")}

    def saved(row: Row, providers: Mapping[str, Row]) -> float | None:
        return None if row.saved_bytes is None else row.saved_bytes / MIB

    def peak(row: Row, providers: Mapping[str, Row]) -> float | None:
        return None if row.peak_bytes is None else row.peak_bytes / MIB

    return _bars([("saved for backward", whole, saved), ("peak", whole, peak)], "MiB", start=0.0)


Value = Callable[[Row, Mapping[str, Row]], float | None]


def _bars(panels: Sequence[tuple[str, Cases, Value]], unit: str, start: float) -> Figure | None:
    """Horizontal bars from `start`, a panel for each of (title, cases, value) that has any."""
    filled = [
        (title, groups) for title, cases, value in panels if (groups := _groups(cases, value))
    ]
    if not filled:
        return None
    bars = [sum(len(bars) + 1 for _, bars in groups) for _, groups in filled]
    figure = Figure(figsize=(10, 1.2 + 0.6 * len(filled) + 0.2 * sum(bars)), layout="constrained")
    axes = figure.subplots(len(filled), 1, squeeze=False, height_ratios=bars)[:, 0]
    colours = _colours([name for _, groups in filled for _, bars in groups for name, _ in bars])
    for axis, (title, groups) in zip(axes, filled):
        _panel(axis, groups, colours, start)
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel(unit, fontsize=8)
    handles = [axes[0].barh(0, 0, color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=6, fontsize=8, frameon=False)
    return figure


Groups = list[tuple[str, list[tuple[str, float]]]]


def _groups(cases: Cases, value: Value) -> Groups:
    groups: Groups = []
    for providers in cases.values():
        values = [(name, value(row, providers)) for name, row in providers.items()]
        bars = [(name, number) for name, number in values if number is not None]
        if bars:
            groups.append((case_label(next(iter(providers.values()))), bars))
    return groups


def _panel(axis: Axes, groups: Groups, colours: Mapping[str, str], start: float) -> None:
    position, ticks, labels = 0.0, [], []
    is_ratio = start > 0
    for label, bars in groups:
        ticks.append(position + (len(bars) - 1) / 2)
        labels.append(label)
        for name, number in bars:
            axis.barh(
                position,
                number - start,
                left=start,
                height=BAR_HEIGHT,
                color=colours[name],
                hatch=LOSES if is_ratio and number < 1 else None,
                edgecolor="white",
            )
            text = f"{number:.2f}" if is_ratio else f"{number:.1f}"
            axis.annotate(
                text,
                (max(number, start), position),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=6,
            )
            position += 1
        position += 1
    axis.set_yticks(ticks, labels, fontsize=7)
    axis.tick_params(axis="x", labelsize=7)
    axis.set_ylim(position - 1, -1)
    axis.spines[["top", "right"]].set_visible(False)
    if is_ratio:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.axvline(1, color="black", linewidth=0.8)
    axis.margins(x=0.08)


def _colours(names: Sequence[str]) -> dict[str, str]:
    """A colour of its own for every provider, fastnas in blues and greens."""
    distinct = list(dict.fromkeys(names))
    own = [name for name in distinct if name not in COLOURS]
    spare = dict(zip(own, FASTNAS_COLOURS * (len(own) // len(FASTNAS_COLOURS) + 1)))
    return {name: COLOURS.get(name, spare.get(name, "black")) for name in distinct}
