"""Reads CIFAR-10 and CIFAR-100 from the pickles that their makers publish, which it does not trust.

https://www.cs.toronto.edu/~kriz/cifar.html ("python version"). A pickle may name any function to
be called; these files need an array to be rebuilt and nothing else, so nothing else is allowed.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastnas.data.dataset import Images
from fastnas.data.source import DataError, one_line

SIDE = 32
ROW = 3 * SIDE * SIDE
"""Bytes of an image: red, green and blue planes of 32 rows."""
_RECONSTRUCT = np.zeros(0).__reduce__()[0]
ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,  # written by NumPy 2
}


@dataclass(frozen=True)
class Layout:
    """Says which files a data set is made of, and what in them is called how.

    Attributes:
        folder: where its archive unpacks them.
    """

    name: str
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: bytes
    names: bytes


CIFAR10 = Layout(
    "cifar10", "cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch",
    "batches.meta", b"labels", b"label_names",
)  # fmt: skip
CIFAR100 = Layout(
    "cifar100", "cifar-100-python", ("train",), "test",
    "meta", b"fine_labels", b"fine_label_names",
)  # fmt: skip
LAYOUTS = {layout.name: layout for layout in (CIFAR10, CIFAR100)}


def cifar_in(folder: Path) -> Layout | None:
    """Returns which of the two a folder holds, by the files of it that are there; None: neither."""
    for layout in LAYOUTS.values():
        files = (*layout.train, layout.test, layout.meta)
        # CIFAR-100's names are common ones, so all three have to be files.
        if any((folder / name).is_file() for name in layout.train) and (
            layout is CIFAR10 or all((folder / name).is_file() for name in files)
        ):
            return layout
    return None


def read_cifar(folder: Path, layout: Layout) -> Images:
    """Reads a data set of CIFAR's, with the names of its classes.

    Raises:
        DataError: a file is missing, holds anything else, or asks for a function to be called.
    """
    names = _names(folder / layout.meta, layout)
    parts = [_part(folder / name, layout, len(names)) for name in layout.train]
    pixels, labels = (torch.cat(columns) for columns in zip(*parts))
    counts = torch.bincount(labels, minlength=len(names))
    if not counts.all():
        unseen = names[int(counts.argmin())]
        raise DataError(f"{folder}: class {unseen} has no training image; expected one or more")
    test, test_labels = _part(folder / layout.test, layout, len(names))
    return Images(layout.name, pixels, labels, test, test_labels, len(names), names)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no such file needs")
        return ALLOWED[module, name]


def _unpickled(path: Path) -> Mapping[Any, Any]:
    try:
        with path.open("rb") as stream:
            # The makers' Python 2 wrote texts as bytes, which the keys are then.
            found = _Unpickler(stream, encoding="bytes").load()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # a pickle made by hand raises anything
        raise DataError(f"{path}: no file of CIFAR's: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds a {type(found).__name__}; expected the dict of CIFAR's")
    return found


def _names(path: Path, layout: Layout) -> tuple[str, ...]:
    names = _unpickled(path).get(layout.names)
    if not isinstance(names, list) or len(names) < 2 or not all(type(n) is bytes for n in names):
        raise DataError(f"{path}: no {layout.names.decode()}; expected the names of the classes")
    return tuple(name.decode("utf-8", "replace") for name in names)


def _part(path: Path, layout: Layout, classes: int) -> tuple[Tensor, Tensor]:
    found = _unpickled(path)
    pixels, labels = found.get(b"data"), found.get(layout.labels)
    if (
        not isinstance(pixels, np.ndarray)
        or pixels.dtype != np.uint8
        or pixels.shape[1:] != (ROW,)
        or not len(pixels)
    ):
        what = f"{getattr(pixels, 'dtype', None)} of shape {getattr(pixels, 'shape', None)}"
        raise DataError(f"{path}: data are {what}; expected uint8 of shape [N, {ROW}]")
    if not isinstance(labels, list) or len(labels) != len(pixels):
        count = len(labels) if isinstance(labels, list) else "no"
        raise DataError(f"{path}: {count} {layout.labels.decode()} for {len(pixels)} images")
    if not all(type(label) is int and 0 <= label < classes for label in labels):
        raise DataError(
            f"{path}: a label is none of 0..{classes - 1}, the classes of {layout.meta}"
        )
    images = torch.from_numpy(np.ascontiguousarray(pixels)).view(-1, 3, SIDE, SIDE)
    return images, torch.tensor(labels, dtype=torch.int64)
