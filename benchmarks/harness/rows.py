"""Writes and reads the rows of a benchmark, whose columns are the fields of a dataclass."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from fastnas.files import write_text

R = TypeVar("R")


def columns(kind: type[Any]) -> list[str]:
    """Returns the names of the fields of a row."""
    return [field.name for field in fields(kind)]


def has_rows(path: Path, kind: type[Any]) -> bool:
    """Tells by its first line whether a file holds such rows."""
    with path.open(encoding="utf-8") as file:
        return file.readline().strip() == ",".join(columns(kind))


def read_rows(path: Path, kind: type[R]) -> list[R]:
    """Reads the rows of a file that `write_rows` wrote.

    Args:
        kind: a dataclass of texts and numbers, None among them where the field says so.

    Raises:
        ValueError: naming the file and the column or line that is wrong.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not has_rows(path, kind):
            raise ValueError(f"{path} is no result of {kind.__module__} of this version")
        return [_row(cells, kind, f"{path}:{reader.line_num}") for cells in reader]


def _row(cells: Mapping[str, str], kind: type[R], where: str) -> R:
    values: dict[str, object] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        cell, type_ = cells.get(field.name), str(field.type)
        try:
            if cell is None or (not cell and type_ in ("int", "float")):
                raise ValueError
            number = int if type_.startswith("int") else float
            values[field.name] = cell if type_ == "str" else number(cell) if cell else None
        except ValueError:
            raise ValueError(f"{where}: {field.name} is {cell!r}; {type_} is needed") from None
    return kind(**values)


def write_rows(path: Path, rows: Iterable[Any], kind: type[Any]) -> None:
    """Writes rows, all of one dataclass."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns(kind), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())
