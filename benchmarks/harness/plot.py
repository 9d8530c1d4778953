"""Plots a benchmark CSV alone: `python -m fastnas.benchmarks.harness.plot CSV PNG`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastnas.benchmarks.harness.schema import Row, by_case, read_csv, speedup
from fastnas.benchmarks.harness.verify import EAGER, YES
from fastnas.report.figures import save_figure

COLOURS = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"),
    *("#332288", "#999933", "#882255", "#44AA99", "#DDCC77", "#AAAAAA"),
)
PASSES = ("fwd+bwd", "step", "saved")
GROUP = 0.8


def plot_csv(csv: Path, out: Path) -> None:
    """Plots speed-up over eager and bytes saved by case; bars left of 1 are slower than eager."""
    # A result that was not verified has no time, and no bar either.
    rows = [row for row in read_csv(csv) if row.pass_ in PASSES and row.verified == YES]
    if not rows:
        raise ValueError(f"{csv} has no verified rows of the passes {', '.join(PASSES)}")
    save_figure(figure(rows), out)


def figure(rows: Sequence[Row]) -> Figure:
    cases = list(by_case(rows).values())
    providers = [p for p in dict.fromkeys(row.backend for row in rows) if p != EAGER]
    drawn = Figure(figsize=(12, 1.5 + 0.7 * len(cases)), layout="constrained")
    speed, saved = drawn.subplots(1, 2, sharey=True)
    speed.invert_yaxis()
    height = GROUP / max(len(providers), 1)
    for index, provider in enumerate(providers):
        offset = (index - (len(providers) - 1) / 2) * height
        colour = COLOURS[index % len(COLOURS)]
        for axes, value in ((speed, _speed), (saved, _saved)):
            points = [
                (position + offset, value(case[provider], case.get(EAGER)))
                for position, case in enumerate(cases)
                if provider in case
            ]
            _bars(axes, points, height, colour, provider)
    _finish(speed, "times as fast as eager (left of 1: slower)", cases)
    _finish(saved, "saved for backward, share of eager's", cases)
    drawn.legend(*speed.get_legend_handles_labels(), loc="outside upper center", ncols=6)
    first = rows[0]
    drawn.supxlabel(
        f"{first.device}, {first.threads} threads, torch {first.torch}, fastnas {first.commit},"
        f" {first.time[:10]}; forward and backward, or the whole search step; medians of one run",
        fontsize=8,
    )
    return drawn


def _speed(row: Row, eager: Row | None) -> float | None:
    return speedup(row, eager)


def _saved(row: Row, eager: Row | None) -> float | None:
    if eager is None or not eager.saved_bytes or row.saved_bytes is None:
        return None
    return row.saved_bytes / eager.saved_bytes


def _bars(
    axes: Axes,
    points: Sequence[tuple[float, float | None]],
    height: float,
    colour: str,
    label: str,
) -> None:
    known = [(position, value) for position, value in points if value is not None]
    axes.barh(
        [position for position, _ in known],
        [value for _, value in known],
        height=height,
        color=colour,
        label=label,
    )


def _finish(axes: Axes, title: str, cases: Sequence[dict[str, Row]]) -> None:
    rows = [next(iter(case.values())) for case in cases]
    names = [f"{r.op} {r.dtype}\n{r.shape} {_variant(r)}" for r in rows]
    axes.set_yticks(range(len(cases)), names, fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.3)


def _variant(row: Row) -> str:
    K = "" if row.K is None else f"K={row.K}"
    shown = row.suite == "ops" and row.layout != "contiguous"
    return f"{K} {row.layout.replace('_', ' ')}" if shown else K


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("picture", type=Path, help="FILE.png or FILE.svg")
    given = parser.parse_args(arguments)
    try:
        plot_csv(given.csv, given.picture)
    except (OSError, ValueError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
