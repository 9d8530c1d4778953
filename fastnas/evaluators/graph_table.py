"""Looks graph networks up: the cells of NAS-Bench-Graph, which its makers trained."""

from __future__ import annotations

from typing import Any

from fastnas.checks import check_choice
from fastnas.evaluators.base import EvaluationError, EvaluatorOptions
from fastnas.evaluators.lookup import Lookup
from fastnas.evaluators.pickles import LARGEST_COST, NUMPY_SCALARS, number_in, read_dict
from fastnas.extras import package_folder
from fastnas.spaces import GraphGenotype, layout_of
from fastnas.spaces.graph import GRAPH_OPS, SKIP, GraphSlots

NAME = "nas-bench-graph"
MODULE = "nas_bench_graph"
OPS = {
    **dict.fromkeys(
        ("cora", "citeseer", "pubmed", "cs", "physics", "photo", "computers", "arxiv"), GRAPH_OPS
    ),
    "proteins": ("gcn", "sage", "arma", "fc", "skip"),
}
"""Data set to the operations that were tried on it."""
CELLS = {9: 26_206, 5: 2_021}
"""Operations to the cells that can be made of them, but for that of skips alone."""
UNTRAINED = GraphGenotype((0, 0, 0, 0), (SKIP,) * 4)
"""The cell that computes nothing; the benchmark did not train it, and gives it 0."""


def read_graph_table(data: str) -> dict[int, dict[str, float]]:
    """Reads key (`GraphGenotype.key`) to what the benchmark knows of a cell.

    Args:
        data: a name of `OPS`.

    Returns:
        `valid` and `test` accuracy, 0 to 1 (of proteins the area under the ROC curve), mean of the
        makers' three seeds; `parameters`; `latency_seconds`.

    Raises:
        ValueError: no such data set.
        MissingPackage: the package is not installed.
        EvaluationError: its file is damaged.
    """
    check_choice("data", data, OPS)
    path = package_folder(MODULE) / "light" / f"{data}.bench"
    found = read_dict(path, f"{NAME}:{data}", NUMPY_SCALARS)
    where = f"table {NAME}:{data}: {path}"
    needed = CELLS[len(OPS[data])]
    if len(found) != needed:
        raise EvaluationError(f"{where}: {len(found)} cells are there, {needed} are needed")
    return {_key(key, data, where): _row(row, f"{where}, cell {key}") for key, row in found.items()}


def _key(key: Any, data: str, where: str) -> int:
    try:
        genotype = GraphGenotype.from_key(key)
    except (TypeError, ValueError) as error:
        raise EvaluationError(f"{where}: {error}") from error
    foreign = list(dict.fromkeys(op for op in genotype.ops if op not in OPS[data]))
    if foreign or genotype == UNTRAINED:
        raise EvaluationError(
            f"{where}: cell {key} has {', '.join(foreign) or 'skips alone'}, which was not tried on"
            f" {data}"
        )
    return genotype.key


def _row(row: Any, where: str) -> dict[str, float]:
    names = {"valid": "valid_perf", "test": "perf", "parameters": "para"}
    names["latency_seconds"] = "latency"
    found = {}
    for name, theirs in names.items():
        if not isinstance(row, dict) or theirs not in row:
            raise EvaluationError(f"{where}: no {theirs}; expected {', '.join(names.values())}")
        high = 1.0 if name in ("valid", "test") else LARGEST_COST
        found[name] = number_in(row[theirs], high, f"{where}: {theirs}")
    # The benchmark counts in millions.
    return found | {"parameters": round(1e6 * found["parameters"])}


class GraphTable(Lookup):
    """Looks cells of NAS-Bench-Graph up: a search sees `valid`, and both are reported.

    Args:
        data: as `read_graph_table` takes it.
    """

    def __init__(self, data: str) -> None:
        found = read_graph_table(data)
        costs, table = {}, {}
        for key, row in found.items():
            genotype = GraphGenotype.from_key(key)
            line = layout_of(genotype).line(genotype)
            table[line] = {name: row[name] for name in ("valid", "test")}
            costs[line] = {name: row[name] for name in row if name not in table[line]}
        table[layout_of(UNTRAINED).line(UNTRAINED)] = {"valid": 0.0, "test": 0.0}
        super().__init__(
            GraphSlots(OPS[data]),
            table,
            "valid",
            ("valid", "test"),
            what=f"NAS-Bench-Graph on {data}",
            settings={"graph_data": data},
            costs={"valid": costs, "test": costs},
        )


class GraphTableOptions(EvaluatorOptions):
    """Opens a table of NAS-Bench-Graph."""

    name = NAME
    place = f"DATA of {', '.join(OPS)}"

    def open(self, place: str) -> GraphTable:
        try:
            return GraphTable(place)
        except ValueError as error:
            raise EvaluationError(f"evaluator {NAME}: {error}") from error
