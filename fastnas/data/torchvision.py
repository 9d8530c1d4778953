"""Reads image data that torchvision knows: CIFAR, SVHN and folders of pictures."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastnas.data.dataset import Images, resize
from fastnas.data.source import DataError, one_line


def read_known(datasets: ModuleType, name: str, data_dir: Path) -> Images:
    """Reads "cifar10", "cifar100" or "svhn", downloading what is missing.

    Args:
        datasets: the module torchvision.datasets.
        name: one of the three.
        data_dir: where torchvision keeps its files.

    Raises:
        DataError: if the files are neither there nor downloadable, or are damaged.
    """
    try:
        if name == "svhn":
            parts = [
                datasets.SVHN(str(data_dir), split=split, download=True)
                for split in ("train", "test")
            ]
            # SVHN's files are [N, C, H, W] already, CIFAR's are [N, H, W, C].
            pixels = [np.asarray(part.data) for part in parts]
            labels = [part.labels for part in parts]
            classes = 10
        else:
            source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
            parts = [source(str(data_dir), train=train, download=True) for train in (True, False)]
            pixels = [np.asarray(part.data).transpose(0, 3, 1, 2) for part in parts]
            labels = [part.targets for part in parts]
            classes = len(parts[0].classes)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{name}: cannot be read from or downloaded to {data_dir}: {one_line(error)}"
        ) from error
    train, test = (torch.from_numpy(np.ascontiguousarray(p)) for p in pixels)
    return Images(name, train, _as_labels(labels[0]), test, _as_labels(labels[1]), classes)


def read_folder(datasets: ModuleType, root: Path, size: int) -> Images:
    """Reads root/train and root/test (root/val without a test), one folder for each class.

    Args:
        datasets: the module torchvision.datasets.
        root: the folder that holds the two.
        size: side in pixels every picture is brought to.

    Raises:
        DataError: if a folder is missing, holds no pictures or other classes than the
            training folder, or a picture cannot be read.
    """
    held_back = root / ("test" if (root / "test").is_dir() else "val")
    for folder, expected in ((root / "train", "train"), (held_back, "test or val")):
        if not folder.is_dir():
            raise DataError(f"{root}: no folder {expected}; expected train, and test or val")
    train, test = (_open_folder(datasets, folder) for folder in (root / "train", held_back))
    # Labels are places in the sorted names of the folders, so other names would shift all of them.
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(
            f"{held_back}: other classes than in train ({', '.join(differing[:5])}); "
            "expected the same folders in both"
        )
    if len(train.classes) < 2:
        raise DataError(f"{root}: one class, {train.classes[0]}; expected at least two")
    pixels = [_pictures(part, size) for part in (train, test)]
    labels = [_as_labels(label for _, label in part.samples) for part in (train, test)]
    return Images(
        root.resolve().name, pixels[0], labels[0], pixels[1], labels[1], len(train.classes)
    )


def _open_folder(datasets: ModuleType, folder: Path) -> Any:
    try:
        return datasets.ImageFolder(str(folder))
    except (OSError, RuntimeError) as error:
        raise DataError(f"{folder}: {one_line(error)}") from error


def _pictures(folder: Any, size: int) -> Tensor:
    def read(sample: tuple[str, int]) -> Tensor:
        path, _ = sample
        try:
            picture = np.array(folder.loader(path))
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{path}: cannot be read: {one_line(error)}") from error
        # Each picture is brought to its size as it is read: a folder of photographs would not fit
        # into memory at theirs.
        return resize(torch.from_numpy(picture).permute(2, 0, 1)[None], size)

    # Decoding leaves Python's lock, so threads read side by side; `map` keeps the order of the
    # labels.
    with ThreadPoolExecutor() as pool:
        return torch.cat(list(pool.map(read, folder.samples)))


def _as_labels(values: Iterable[int]) -> Tensor:
    return torch.tensor([int(value) for value in values], dtype=torch.int64)
