"""Measures regret on NAS-Bench-201: methods on distributions beside their twins on cells.

    python -m fastnas.benchmarks.search.distribution TABLE.csv OUT.csv [--plot OUT.png]
        [--explained OUT.png] [--page docs/distribution.md]

A search sees 12-epoch validation accuracies and is judged by the 200-epoch test accuracy of the
cell that it has then found best. A row is a whole search. Run again, it goes on with the rows that
are missing.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

from fastnas.benchmarks.harness.readme import updated
from fastnas.blackbox import BLACK_BOX, get_black_box
from fastnas.blackbox.domains import unseen_cell
from fastnas.blackbox.methods.base import Observation
from fastnas.evaluators.table import by_distribution, explained_variance, read_table
from fastnas.files import write_text
from fastnas.report.figures import save_figure
from fastnas.spaces import AnyGenotype, to_nb201
from fastnas.spaces.nb201 import NB201Slots
from fastnas.spaces.slots import SlotLayout

BUDGETS = tuple(range(10, 201, 10))
DATA = {"cifar10": "c10", "cifar100": "c100", "imagenet16-120": "in16"}
FITTED = ("bo", "anasod-bo")
FIT_AT = 10, 0.25
"""A Gaussian process, whose fit is most of the time, proposes this many points of one fit, or this
share of those observed where that is more."""
REFERENCE, PREFIX = "random", "anasod-"
BLOCK = "distribution"

Table = Mapping[str, Mapping[str, float]]
Row = dict[str, Any]


def searched(method: str, table: Table, data: str, seed: int) -> list[float]:
    """Returns the test accuracy of the incumbent at each budget."""
    seen, judged = columns(data)
    entries = incumbents(
        method,
        NB201Slots(),
        lambda cell: table[to_nb201(cell)],  # type: ignore[arg-type]
        seen,
        BUDGETS[-1],
        seed,
    )
    return [entry[judged] for count, entry in enumerate(entries, 1) if count in BUDGETS]


def incumbents(
    method: str,
    layout: SlotLayout,
    look: Callable[[AnyGenotype], Mapping[str, float]],
    seen: str,
    budget: int,
    seed: int,
) -> Iterator[Mapping[str, float]]:
    """Searches, and yields after each evaluation what the table has of the best cell so far.

    Args:
        look: returns a cell's row of the table.
        seen: the column of the row that the search sees.
    """
    box, rng = get_black_box(method), np.random.default_rng(seed)
    domain = box.domain(layout)
    past: list[Observation] = []
    cells: set[AnyGenotype] = set()
    best: Mapping[str, float] = {seen: -1.0}
    while len(past) < budget:
        count = max(FIT_AT[0], int(FIT_AT[1] * len(past))) if method in FITTED else 1
        # Proposals of one fit are evaluated before the next, as by workers side by side.
        for one in box.propose(domain, past, rng, min(count, budget - len(past))):
            cell = unseen_cell(domain, one.point, rng, cells)
            # A table has one accuracy of a cell, so a second look at it would tell nothing.
            cells.add(cell)
            entry = look(cell)
            past.append(Observation(one.point, entry[seen], one.origin))
            # The incumbent is chosen by what the search sees; what it is judged by chooses nothing.
            if entry[seen] > best[seen]:
                best = entry
            yield best


def columns(data: str) -> tuple[str, str]:
    """Says what a search sees, and what it is judged by."""
    return f"{DATA[data]}_valid_12ep", f"{DATA[data]}_test_200ep"


def read(path: Path) -> list[Row]:
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def curves(rows: Iterable[Row], table: Table) -> dict[tuple[str, str], NDArray[np.float64]]:
    """Maps (data, method) to each search's regret in points of accuracy, [seeds, budgets]."""
    groups: dict[tuple[str, str], list[list[float]]] = {}
    for row in rows:
        accuracies = [float(row[str(budget)]) for budget in BUDGETS]
        groups.setdefault((row["data"], row["method"]), []).append(accuracies)
    found = {}
    for (data, method), group in groups.items():
        best = max(entry[columns(data)[1]] for entry in table.values())
        found[data, method] = 100 * (best - np.asarray(group))
    return found


def summary(regrets: Mapping[tuple[str, str], NDArray[np.float64]]) -> str:
    """Writes Markdown: mean regret at the end, its 95 % interval, evaluations to random's end."""
    names = list(dict.fromkeys(data for data, _ in regrets))
    heads = [text for data in names for text in (f"{data}, regret", "evaluations")]
    lines = [f"| method | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for method in BLACK_BOX:
        cells = []
        for data in names:
            regret, goal = regrets.get((data, method)), regrets.get((data, REFERENCE))
            if regret is not None and goal is not None:
                end = regret[:, -1]
                cells += [f"{end.mean():.2f} +- {half_width(end):.2f}", _reached(regret, goal)]
        if len(cells) == len(heads):
            lines.append(f"| {method} | {' | '.join(cells)} |")
    seeds = sorted({len(regret) for regret in regrets.values()})
    return "\n".join(
        [
            *lines,
            "",
            f"Regret in points of 200-epoch test accuracy after {BUDGETS[-1]} evaluations by"
            " 12-epoch validation accuracy, mean and 95 % interval; evaluations until the mean is"
            f" what `{REFERENCE}` has after {BUDGETS[-1]}."
            f" {' or '.join(map(str, seeds))} searches each. A Gaussian process proposes"
            f" {FIT_AT[0]} points of one fit, or {FIT_AT[1]:.0%} of those observed; the rates of"
            " the two score-function methods were chosen here, with other seeds.",
        ]
    )


def _reached(regret: NDArray[np.float64], goal: NDArray[np.float64]) -> str:
    last = goal.mean(0)[-1]
    return next(
        (str(b) for b, r in zip(BUDGETS, regret.mean(0)) if r <= last), f"over {BUDGETS[-1]}"
    )


def half_width(values: NDArray[np.float64]) -> float:
    """Returns that of the 95 % interval of the mean over seeds."""
    return float(1.96 * values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def draw(regrets: Mapping[tuple[str, str], NDArray[np.float64]], path: Path) -> None:
    """Draws, for each data set, mean regret against evaluations, with 95 % bands; twins alike."""
    names = list(dict.fromkeys(data for data, _ in regrets))
    colours = list(dict.fromkeys(method.removeprefix(PREFIX) for method in BLACK_BOX))
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    for panel, data in enumerate(names, 1):
        axes = figure.add_subplot(1, len(names), panel)
        for (other, method), regret in regrets.items():
            if other != data:
                continue
            colour = f"C{colours.index(method.removeprefix(PREFIX))}"
            mean = regret.mean(0)
            width = np.array([half_width(regret[:, i]) for i in range(regret.shape[1])])
            style = "-" if method.startswith("anasod-") else "--"
            axes.plot(BUDGETS, mean, style, color=colour, label=method)
            axes.fill_between(BUDGETS, mean - width, mean + width, color=colour, alpha=0.15)
        axes.set_title(data)
        axes.set_xlabel("evaluations")
        axes.set_ylabel("regret, points of test accuracy")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def draw_explained(table: Table, path: Path) -> None:
    """Draws, for each data set, every cell above its distribution, those by their means."""
    figure = Figure(figsize=(5 * len(DATA), 4), layout="constrained")
    for panel, data in enumerate(DATA, 1):
        axes, judged = figure.add_subplot(1, len(DATA), panel), columns(data)[1]
        groups = sorted(by_distribution(table, judged), key=lambda group: group.mean())
        ranks = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        cells = 100 * np.concatenate(groups)
        axes.plot(ranks, cells, ".", markersize=1.5, color="0.6", rasterized=True)
        axes.plot([100 * group.mean() for group in groups], color="C3", label="mean")
        axes.set_title(f"{data}: explains {explained_variance(table, judged):.3f} of the variance")
        axes.set_xlabel("distributions over operations, by their mean")
        axes.set_ylabel("test accuracy, per cent")
        axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path, help="of NAS-Bench-201")
    parser.add_argument("csv", type=Path, help="a row per search")
    parser.add_argument("--plot", type=Path, default=None, help="FILE.png or FILE.svg")
    parser.add_argument("--page", type=Path, default=None, help="puts the summary into its block")
    parser.add_argument("--explained", type=Path, default=None, help="FILE.png or FILE.svg")
    parser.add_argument("--method", action="append", choices=BLACK_BOX, help="may be repeated")
    parser.add_argument("--data", action="append", choices=DATA, help="may be repeated")
    parser.add_argument("--seeds", type=int, default=200)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # matrices of at most 200 rows
    table = read_table(given.table, *(column for data in DATA for column in columns(data)))
    for data in DATA:
        share = explained_variance(table, columns(data)[1])
        print(f"{data}: the distribution explains {share:.3f} of the variance")
    rows = read(given.csv)
    done = {(row["data"], row["method"], int(row["seed"])) for row in rows}
    wanted = itertools.product(given.data or DATA, given.method or BLACK_BOX, range(given.seeds))
    with given.csv.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        # An empty or new file gets the header; one that goes on has it.
        if file.tell() == 0:
            writer.writerow(["data", "method", "seed", *BUDGETS])
        for data, method, seed in wanted:
            if (data, method, seed) not in done:
                accuracies = searched(method, table, data, seed)
                writer.writerow([data, method, seed, *(f"{a:.6f}" for a in accuracies)])
                # A run that is killed goes on after the last whole search.
                file.flush()
    regrets = curves(read(given.csv), table)
    print(summary(regrets))
    if given.page is not None:
        write_text(given.page, updated(given.page.read_text(), BLOCK, summary(regrets)))
    if given.plot is not None:
        draw(regrets, given.plot)
    if given.explained is not None:
        draw_explained(table, given.explained)


if __name__ == "__main__":
    main()
