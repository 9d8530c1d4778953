"""Reads image data from one .npz file; every way such a file can be wrong is told in one line."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastnas.checks import typed
from fastnas.data.batches import split_indices
from fastnas.data.dataset import Images, check_bytes
from fastnas.data.source import DataError, one_line

HELD_BACK = 0.2
HELD_BACK_SEED = 0
CHANNEL_COUNTS = range(1, 5)

Array = NDArray[Any]


def read_archive(path: Path) -> Images:
    """Reads images and labels from a .npz file.

    Args:
        path: a file with `images` (uint8, or floats in 0..1; [N, H, W, C], [N, C, H, W] with
            1 to 4 channels, or [N, H, W]), `labels` (integers [N], every value of
            0 .. classes - 1 in use) and optionally `split` ([N], 0 for train and 1 for test).
            Without `split` a fifth of each class is held back for the test, always the same.

    Raises:
        DataError: if the file is missing or broken, or holds anything else.
    """
    arrays = _read_arrays(path)
    images = _pixels(path, arrays["images"])
    labels = _labels(path, arrays["labels"], len(images))
    divided = divide(path.stem, images, labels, _test_mask(path, arrays.get("split"), len(images)))
    counts = torch.bincount(divided.train_labels, minlength=divided.classes)
    if not counts.all():
        unseen = int(counts.argmin())
        raise DataError(f"{path}: class {unseen} has no training image; expected one or more")
    return divided


@typed
def divide(name: str, images: Tensor, labels: Tensor, is_test: Tensor | None = None) -> Images:
    """Divides one set into training and test images.

    Args:
        name: what the data set is called.
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        is_test: bool [N]; None holds back a fifth of each class, always the same.

    Raises:
        TypeError, ValueError: images or labels of other dtypes or shapes.
    """
    check_bytes("images", images)
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels are {labels.dtype} of shape {list(labels.shape)}; torch.int64 of shape"
            f" [{len(images)}] is needed"
        )
    if is_test is None:
        # The seed is the file's, not the run's: every run must be tested on the same images.
        test, train = split_indices(labels, HELD_BACK, HELD_BACK_SEED)
    else:
        test, train = is_test.nonzero().flatten(), (~is_test).nonzero().flatten()
    classes = int(labels.max()) + 1
    return Images(name, images[train], labels[train], images[test], labels[test], classes)


def _read_arrays(path: Path) -> dict[str, Array]:
    try:
        with path.open("rb") as stream:
            # numpy takes a file that is no archive for a pickle, and would tell that pickles are
            # not allowed.
            is_archive = zipfile.is_zipfile(stream)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise DataError(f"{path}: cannot be read: {reason}") from error
    if not is_archive:
        raise DataError(f"{path}: not a .npz file (not a zip archive); write it with numpy.savez")
    arrays = {}
    try:
        # A pickle could run code, so arrays of objects are refused.
        with np.load(path, allow_pickle=False) as archive:
            found = list(archive.files)
            for key in ("images", "labels", "split"):
                if key in found:
                    arrays[key] = archive[key]
    except (ValueError, OSError, EOFError, RuntimeError, MemoryError, zlib.error) as error:
        raise DataError(
            f"{path}: cannot be read as plain number arrays: {one_line(error)}"
        ) from error
    except zipfile.BadZipFile as error:
        raise DataError(f"{path}: the zip archive is damaged: {one_line(error)}") from error
    for key in ("images", "labels"):
        if key not in arrays:
            raise DataError(
                f"{path}: no array {key!r}, found {', '.join(found) or 'nothing'}; "
                "expected images, labels and optionally split"
            )
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise DataError(f"{path}: {key} is not a numpy array; write the file with numpy.savez")
    return arrays


def _pixels(path: Path, images: Array) -> Tensor:
    shape = list(images.shape)
    if images.ndim not in (3, 4):
        raise DataError(
            f"{path}: images have shape {shape}; expected [N, H, W], [N, H, W, C] or [N, C, H, W]"
        )
    if images.size == 0:
        raise DataError(
            f"{path}: images have shape {shape}, no pixel at all; expected at least one"
        )
    if images.ndim == 3:
        images = images[:, None]
    else:
        channels_first, channels_last = (shape[axis] in CHANNEL_COUNTS for axis in (1, 3))
        # A guess could turn the images on their side without anybody seeing it.
        if channels_first == channels_last:
            why = "either could be" if channels_first else "neither can be"
            raise DataError(
                f"{path}: images have shape {shape}: of axes 1 and 3 {why} the channels; "
                "expected 1 to 4 channels and more than 4 pixels a side"
            )
        if channels_last:
            images = images.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(_bytes(path, images)))


def _bytes(path: Path, images: Array) -> Array:
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise DataError(
            f"{path}: images have dtype {images.dtype}; expected uint8, or floats in 0..1"
        )
    if not np.isfinite(images).all():
        raise DataError(f"{path}: images hold NaN or infinity; expected uint8, or floats in 0..1")
    low, high = images.min(), images.max()
    if low < 0 or high > 1:
        raise DataError(
            f"{path}: images are {images.dtype} in {low:g}..{high:g}; "
            "expected floats in 0..1, or uint8"
        )
    # They are rounded, not cut off: x / 255 times 255 may come out just below the level that it
    # was.
    return np.rint(images.astype(np.float32) * 255).astype(np.uint8)


def _labels(path: Path, labels: Array, count: int) -> Tensor:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{path}: labels are {labels.dtype} of shape {list(labels.shape)}; "
            f"expected integers of shape [{count}]"
        )
    if len(labels) != count:
        raise DataError(f"{path}: {len(labels)} labels for {count} images; expected one for each")
    distinct = np.unique(labels)
    classes = len(distinct)
    if classes < 2:
        raise DataError(f"{path}: every label is {distinct[0]}; expected at least two classes")
    stray = distinct[(distinct < 0) | (distinct >= classes)]
    if len(stray):
        raise DataError(
            f"{path}: label {stray[0]} found; with {classes} different labels "
            f"expected 0..{classes - 1}"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _test_mask(path: Path, split: Array | None, count: int) -> Tensor | None:
    if split is None:
        if count * HELD_BACK < 1:
            raise DataError(
                f"{path}: {count} images are too few to hold back a fifth for the test; "
                "expected at least 5, or an array 'split'"
            )
        return None
    if split.shape != (count,) or split.dtype.kind not in "biu":
        raise DataError(
            f"{path}: split is {split.dtype} of shape {list(split.shape)}; "
            f"expected integers of shape [{count}]"
        )
    values = np.unique(split).astype(int).tolist()
    if values != [0, 1]:
        raise DataError(f"{path}: split holds {values[:5]}; expected both 0 (train) and 1 (test)")
    return torch.from_numpy(split.astype(bool))
