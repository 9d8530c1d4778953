"""Finds image data by name: the bundled digits, a .npz file, or what torchvision reads."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from fastnas.checks import short, typed
from fastnas.data.dataset import Images
from fastnas.data.npz import divide, read_archive
from fastnas.data.source import DataError
from fastnas.data.torchvision import read_folder, read_known
from fastnas.extras import require
from fastnas.text_file import file_path

__all__ = ["DataError", "Images", "load_images"]

KNOWN = ("cifar10", "cifar100", "svhn")
FOLDER = "imagefolder:"


@typed
def load_images(
    name_or_path: str | Path,
    *,
    data_dir: Path = Path("data"),
    image_size: int | None = None,
) -> Images:
    """Loads a data set into memory.

    Args:
        name_or_path: one of

            - "digits": scikit-learn's 1,797 grey 8x8 digits, a fifth held back for the test;
            - a path ending in .npz, see `fastnas.data.npz.read_archive`;
            - "cifar10", "cifar100" or "svhn": read by torchvision, which downloads what is missing;
            - "imagefolder:PATH": PATH/train and PATH/test (or PATH/val), one folder a class,
              read by torchvision.
        data_dir: where torchvision keeps its files.
        image_size: side in pixels to bring every image to: the shorter side is scaled
            (bilinear, antialiased) and the centre cropped. Required for an image folder.

    Raises:
        TypeError: if image_size is not an integer.
        ValueError: if it is not positive.
        DataError: if the data set is unknown, missing or broken.
        MissingPackage: if it needs scikit-learn or torchvision and that is not installed.
    """
    name = str(name_or_path)
    if image_size is not None:
        if not isinstance(image_size, int) or isinstance(image_size, bool):
            raise TypeError(f"image_size is {image_size!r}; expected a whole number of pixels")
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}; expected 1 or more pixels")
    if name.startswith(FOLDER):
        if image_size is None:
            raise DataError(f"{name}: image_size is not given; an image folder needs one")
        root = file_path(name[len(FOLDER) :])
        return read_folder(_torchvision_datasets(), root, image_size)
    if name == "digits":
        images = _digits()
    elif name in KNOWN:
        images = read_known(_torchvision_datasets(), name, data_dir)
    elif name.lower().endswith(".npz"):
        images = read_archive(file_path(name))
    else:
        raise DataError(
            f"unknown data set {short(name)}; expected digits, {', '.join(KNOWN)}, "
            "imagefolder:PATH or a path ending in .npz"
        )
    return images if image_size is None else images.resized(image_size)


def _digits() -> Images:
    require("sklearn")
    from sklearn.datasets import load_digits

    digits = load_digits()
    # scikit-learn's digits have 17 levels, 0 to 16.
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return divide("digits", torch.from_numpy(pixels)[:, None], labels)


def _torchvision_datasets() -> ModuleType:
    require("torchvision.datasets")
    return importlib.import_module("torchvision.datasets")
