"""Reads the pickles in which benchmarks keep tables, and trusts none of them.

A pickle may name any function of any module to be called. Nothing that a file names is imported
here: a name has a stand-in of fastnas, or the file is refused.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastnas.checks import short
from fastnas.evaluators.base import EvaluationError

LARGEST = 1 << 25
"""Bytes of a file; those of the benchmarks have 2 MB."""
LARGEST_COST = 1e12
"""Millions of parameters, or seconds: a number above it is none that was measured."""
StandIns = Mapping[tuple[str, str], Callable[..., Any]]


class _Float64:
    """Stands for the dtype of a NumPy scalar; only that of little-endian 64-bit floats is taken."""

    def __init__(self, name: object, *_: object) -> None:
        if name != "f8":
            raise pickle.UnpicklingError(f"it holds a NumPy scalar of dtype {short(name)}, not f8")

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or state[1:2] != ("<",):
            raise pickle.UnpicklingError("it holds a NumPy scalar that is not little-endian")


def _scalar(dtype: object, content: object) -> float:
    if not isinstance(dtype, _Float64) or not isinstance(content, bytes):
        raise pickle.UnpicklingError(
            "it holds a NumPy scalar that is not made of a dtype and bytes"
        )
    (value,) = struct.unpack("<d", content)
    return float(value)


NUMPY_SCALARS: StandIns = {
    ("numpy", "dtype"): _Float64,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,  # written by NumPy 2
}
"""What a pickled `numpy.float64` asks for."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, stand_ins: StandIns) -> None:
        super().__init__(io.BytesIO(content))
        self._stand_ins = stand_ins

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._stand_ins:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no such table needs")
        return self._stand_ins[module, name]


def read_dict(path: Path, what: str, stand_ins: StandIns | None = None) -> dict[Any, Any]:
    """Reads a pickled dict of plain values.

    Args:
        what: names the table in messages.
        stand_ins: (module, name) to what is called in its place; None: no name is allowed.

    Raises:
        EvaluationError: it cannot be read, is larger than `LARGEST`, is cut off, holds something
            else, or names a function or a class that has no stand-in.
    """
    where = f"table {what}: {path}"
    try:
        with path.open("rb") as stream:
            content = stream.read(LARGEST + 1)
    except OSError as error:
        raise EvaluationError(f"{where} cannot be read: {error.strerror}") from error
    if len(content) > LARGEST:
        raise EvaluationError(f"{where} cannot be read: it is larger than {LARGEST >> 20} MiB")
    try:
        found = _Unpickler(content, stand_ins or {}).load()
    except Exception as error:  # a pickle made by hand raises anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise EvaluationError(f"{where} is no table: {reason}") from error
    if not isinstance(found, dict):
        raise EvaluationError(f"{where} is no table: it holds a {type(found).__name__}, no dict")
    return found


def number_in(value: object, high: float, where: str) -> float:
    """Returns a number of a table, 0 to `high`; EvaluationError where it is none."""
    # Floats alone: of a whole number of thousands of digits `float` raises an error of its own.
    if type(value) is not float or not 0 <= value <= high:
        raise EvaluationError(f"{where} is {short(value)}; a number from 0 to {high:g} is needed")
    return value
