"""Finds image data by name: the bundled digits, a .npz file, a folder, or what torchvision has."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from fastnas.bounds import Bounds, whole
from fastnas.checks import short, typed
from fastnas.data.cifar import LAYOUTS, Layout, cifar_in, read_cifar
from fastnas.data.dataset import Images
from fastnas.data.npz import divide, read_archive
from fastnas.data.source import DataError, ImageSource
from fastnas.data.torchvision import read_known
from fastnas.data.workers import usual_workers
from fastnas.extras import require
from fastnas.text_file import file_path

__all__ = ["DataError", "Images", "load_images"]

KNOWN = ("cifar10", "cifar100", "svhn")
FOLDER = "imagefolder:"
CROP_SCALE = 0.08
CENTRE_SHARE = 0.875
SIDES = whole(1, 4096)
WORKERS = whole(0, 256)
SHARES = Bounds(0, 1, above=True)


@typed
def load_images(
    name_or_path: str | Path,
    *,
    data_dir: Path = Path("data"),
    image_size: int | None = None,
    workers: int | None = None,
    crop_scale: float | None = None,
    centre_share: float | None = None,
) -> ImageSource:
    """Finds a data set; a folder of pictures is read as they are needed, others are held in memory.

    Args:
        name_or_path: one of

            - "digits": scikit-learn's 1,797 grey 8x8 digits, a fifth held back for the test;
            - a path ending in .npz, see `fastnas.data.npz.read_archive`;
            - a folder of pictures, also as "imagefolder:PATH": PATH/train/CLASS/FILE, and for the
              test a folder test, val or valid like it, the first that there is; or PATH/CLASS/FILE,
              of which a fifth of each class is held back, always the same;
            - "cifar10" or "cifar100": read of the files that its makers publish, in
              data_dir/cifar-10-batches-py or data_dir/cifar-100-python, and, where there are none,
              downloaded to there by torchvision;
            - a folder of such files, wherever it lies;
            - "svhn": read by torchvision, which downloads what is missing.
        data_dir: where data sets that have a name of their own are kept.
        image_size: side in pixels to bring every image to. In memory the shorter side is scaled
            (bilinear, antialiased) and the centre cropped. Required for a folder of pictures.
        workers: processes for each stream of pictures, None: a quarter of the CPUs, at most 8.
            No result depends on it.
        crop_scale: the smallest share of a picture's area that a random crop for training has,
            None: 0.08. At 1 pictures for training are cut as those of a test.
        centre_share: share of a picture's shorter side that the square of a test has, None: 0.875.

    Raises:
        TypeError: if a number is none, or not a whole one.
        ValueError: if it is out of its bounds.
        DataError: if the data set is unknown, missing or broken, or one of the last three is given
            for one that is held in memory.
        MissingPackage: if it needs scikit-learn, Pillow or torchvision and that is not installed.
    """
    name = str(name_or_path)
    of_folders = {"workers": workers, "crop_scale": crop_scale, "centre_share": centre_share}
    _check_bounds(image_size, of_folders)
    cifar = _cifar(name, data_dir)
    if cifar is None and (name.startswith(FOLDER) or _is_folder(name)):
        return _folder(name.removeprefix(FOLDER), image_size, workers, crop_scale, centre_share)
    if cifar is not None:
        images = read_cifar(*cifar)
    elif name == "digits":
        images = _digits()
    elif name in KNOWN:
        images = read_known(_torchvision_datasets(), name, data_dir)
    elif name.lower().endswith(".npz"):
        images = read_archive(file_path(name))
    else:
        raise DataError(
            f"unknown data set {short(name)}; expected digits, {', '.join(KNOWN)}, "
            "a folder of pictures or a path ending in .npz"
        )
    for setting, value in of_folders.items():
        if value is not None:
            raise DataError(
                f"{setting} is {value}, but {name} is held in memory; only a folder of pictures"
                f" has {setting}"
            )
    return images if image_size is None else images.resized(image_size)


def _check_bounds(image_size: int | None, of_folders: dict[str, float | None]) -> None:
    if isinstance(image_size, int) and image_size < 1:
        raise ValueError(f"image_size is {image_size}; expected 1 or more pixels")
    for setting, value in of_folders.items():
        if value is not None:
            (WORKERS if setting == "workers" else SHARES).check(setting, value)


def _cifar(name: str, data_dir: Path) -> tuple[Path, Layout] | None:
    """Returns the folder and the layout of CIFAR's own files, where a name leads to them."""
    if name in LAYOUTS:
        folder = data_dir / LAYOUTS[name].folder
        return (folder, LAYOUTS[name]) if folder.is_dir() else None
    folder = file_path(name)
    layout = cifar_in(folder) if _is_folder(name) else None
    return None if layout is None else (folder, layout)


def _is_folder(name: str) -> bool:
    if name in (*KNOWN, "digits", "") or name.lower().endswith(".npz"):
        return False
    return os.path.isdir(file_path(name))


def _folder(
    name: str,
    size: int | None,
    workers: int | None,
    crop_scale: float | None,
    centre_share: float | None,
) -> ImageSource:
    root = file_path(name)
    if size is None:
        raise DataError(f"{root}: image_size is not given; a folder of pictures needs one")
    require("PIL.Image")
    # Pillow belongs to an extra, so what imports it is imported where it is needed.
    from fastnas.data.folder import read_folder

    return read_folder(
        root,
        size,
        usual_workers() if workers is None else workers,
        CROP_SCALE if crop_scale is None else crop_scale,
        CENTRE_SHARE if centre_share is None else centre_share,
    )


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
