"""Finds the pictures in a folder: where they lie, which are tests, of which class each is."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastnas.data.source import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".pbm", ".bmp", ".tif", ".tiff", ".webp")
TRAIN = ("train", "training")
HELD = ("test", "testing", "val", "valid", "validation")
"""In this order: where there is a test, the others are not read."""
NAMED = 5
"""So many names a message has at most."""

logger = logging.getLogger("fastnas")


@dataclass(frozen=True, eq=False)
class Pictures:
    """Holds where pictures lie and what they show, in three objects however many there are.

    A worker shares memory with the process that it was forked of until either writes there, and
    counting a reference is writing: a list of a million names would soon be copied by each.

    Attributes:
        root: the folder that the names are relative to.
        names: all of them, as the file system has them, one after the other.
        ends: int64 [N], where each name ends.
        labels: int64 [N].
        sizes: int64 [N], of the files in bytes.
    """

    root: str
    names: bytes
    ends: NDArray[np.int64]
    labels: Tensor
    sizes: NDArray[np.int64]

    @classmethod
    def of(cls, root: str, rows: Sequence[tuple[str, int, int]]) -> Pictures:
        """Makes it of names, labels and sizes."""
        names = [os.fsencode(name) for name, _, _ in rows]
        return cls(
            root,
            b"".join(names),
            np.cumsum([len(name) for name in names], dtype=np.int64),
            torch.tensor([label for _, label, _ in rows], dtype=torch.int64),
            np.array([size for _, _, size in rows], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, number: int) -> str:
        """Returns the name of a picture, relative to the root."""
        start = self.ends[number - 1] if number else 0
        return os.fsdecode(self.names[start : self.ends[number]])

    def path(self, number: int) -> str:
        return os.path.join(self.root, self.name(number))

    def chosen(self, index: Tensor) -> Pictures:
        """Returns those of an int64 index [K]."""
        numbers = index.tolist()
        labels, sizes = self.labels.tolist(), self.sizes.tolist()
        return Pictures.of(self.root, [(self.name(i), labels[i], sizes[i]) for i in numbers])


@dataclass(frozen=True)
class Listing:
    """Holds what a folder was found to have.

    Attributes:
        classes: names of the class folders, sorted; a label is a place in them.
        train: the pictures to train on, by class and name.
        test: those to test on; None: the folder does not say which.
    """

    classes: tuple[str, ...]
    train: Pictures
    test: Pictures | None


def list_folder(root: Path) -> Listing:
    """Lists a folder of pictures, and logs what in it is not read.

    Raises:
        DataError: it is not laid out as `fastnas.data.load.load_images` says, a class has no
            picture, train and test have other classes, or a file is empty or not there.
    """
    top = os.path.abspath(root)
    folders, left_out = _entries(top)
    train, held = _split_folder(top, folders, TRAIN), _split_folder(top, folders, HELD)
    if train is None and held is not None:
        raise DataError(
            f"{root}: a folder {held} of classes, but no folder train; expected both, or one"
            " folder for each class"
        )
    test = None
    if train is not None:
        left_out += [f"{name}{os.sep}" for name in folders if name not in (train, held)]
    classes, pictures = _classes(top, train or "", left_out)
    if held is not None:
        held_classes, test = _classes(top, held, left_out)
        # Labels are places in the sorted names of the folders: other names would shift them all.
        if classes != held_classes:
            differing = sorted({*classes} ^ {*held_classes})
            raise DataError(
                f"{os.path.join(top, held)}: other classes than in {train} ({_some(differing)});"
                " expected the same folders in both"
            )
    if left_out:
        logger.warning("fastnas: %s: not read: %s", root, _some(left_out))
    return Listing(classes, pictures, test)


def _entries(folder: str) -> tuple[list[str], list[str]]:
    """Returns the names of the folders and of the files in a folder, sorted, hidden ones left out.

    Links count as what they lead to.
    """
    try:
        with os.scandir(folder) as found:
            entries = [(e.name, e.is_dir()) for e in found if not e.name.startswith(".")]
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{folder}: cannot be read: {reason}") from error
    entries.sort()
    folders = [name for name, is_folder in entries if is_folder]
    return folders, [name for name, is_folder in entries if not is_folder]


def _split_folder(top: str, folders: Sequence[str], names: Sequence[str]) -> str | None:
    """Returns the folder that has the first of these names, in capitals or not, and holds folders.

    One that holds pictures is a class that happens to be called so.
    """
    for name in names:
        found = [
            folder
            for folder in folders
            if folder.lower() == name and _entries(os.path.join(top, folder))[0]
        ]
        if len(found) > 1:
            raise DataError(f"{top}: folders {_some(found)}; expected one of them")
        if found:
            return found[0]
    return None


def _classes(top: str, part: str, left_out: list[str]) -> tuple[tuple[str, ...], Pictures]:
    """Lists one folder of class folders.

    Args:
        part: its name in `top`; empty: `top` itself.
        left_out: gets what is not read.
    """
    folder = os.path.join(top, part) if part else top
    classes, loose = _entries(folder)
    if not classes:
        raise DataError(
            f"{folder}: no folder in it; expected train and test (or val), or one folder for each"
            " class"
        )
    if len(classes) < 2:
        raise DataError(f"{folder}: one class, {classes[0]}; expected at least two")
    if part:
        left_out += (os.path.join(part, name) for name in loose)
    rows: list[tuple[str, int, int]] = []
    for label, name in enumerate(classes):
        inside = os.path.join(part, name)
        files = _files(top, inside)
        pictures = [file for file in files if is_picture(file)]
        if not pictures:
            raise DataError(f"{os.path.join(top, inside)}: no picture; expected at least one")
        left_out += (file for file in files if not is_picture(file))
        rows += ((file, label, _size(os.path.join(top, file))) for file in pictures)
    return tuple(classes), Pictures.of(top, rows)


def is_picture(name: str) -> bool:
    """Tells by its suffix, in capitals or not, whether a file is read."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _files(top: str, inside: str) -> list[str]:
    """Returns the files of a class, relative to `top`: in its folder, and in folders in that.

    Deeper ones are refused: a wrong path would have the whole file system listed.
    """
    folders, files = _entries(os.path.join(top, inside))
    found = [os.path.join(inside, file) for file in files]
    for name in folders:
        deeper, files = _entries(os.path.join(top, inside, name))
        if deeper:
            raise DataError(
                f"{os.path.join(top, inside, name, deeper[0])}: a folder so deep; expected"
                " pictures in the folder of a class, or in folders in that"
            )
        found += [os.path.join(inside, name, file) for file in files]
    return found


def _size(path: str) -> int:
    try:
        size = os.stat(path).st_size
    except OSError as error:  # a link that leads nowhere
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if size == 0:
        raise DataError(f"{path}: an empty file; expected a picture")
    return size


def _some(names: Iterable[str]) -> str:
    """Returns the first names, and how many more there are."""
    # A name may hold what moves the cursor of a terminal.
    listed = ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in name) for name in names]
    more = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    return ", ".join(listed[:NAMED]) + more
