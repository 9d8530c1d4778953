"""Reads the data sets that torchvision downloads: CIFAR and SVHN."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from fastnas.data.dataset import Images
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
            names: tuple[str, ...] = tuple("0123456789")
        else:
            source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
            parts = [source(str(data_dir), train=train, download=True) for train in (True, False)]
            pixels = [np.asarray(part.data).transpose(0, 3, 1, 2) for part in parts]
            labels = [part.targets for part in parts]
            names = tuple(parts[0].classes)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{name}: cannot be read from or downloaded to {data_dir}: {one_line(error)}"
        ) from error
    train, test = (torch.from_numpy(np.ascontiguousarray(p)) for p in pixels)
    return Images(
        name, train, _as_labels(labels[0]), test, _as_labels(labels[1]), len(names), names
    )


def _as_labels(values: Iterable[int]) -> Tensor:
    return torch.tensor([int(value) for value in values], dtype=torch.int64)
