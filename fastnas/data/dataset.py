"""Holds labelled images in memory as bytes: what a small data set is turned into."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnas.checks import check_fields, check_int, typed
from fastnas.data.batches import Batches
from fastnas.data.source import ImageSource, Stream, byte_counts, moments
from fastnas.processes import WHOLE, Share
from fastnas.transfer import to_device

# So many images are float at a time, four times as large as their bytes.
RESIZE_CHUNK = 512


def check_bytes(name: str, images: Tensor) -> None:
    """Raises TypeError or ValueError unless `images` are uint8 [N, C, H, W]."""
    if images.dtype != torch.uint8:
        raise TypeError(f"{name} has dtype {images.dtype}; expected torch.uint8")
    if images.dim() != 4:
        raise ValueError(f"{name} has shape {list(images.shape)}; expected [N, C, H, W]")


@dataclass(frozen=True, eq=False)
class Images(ImageSource):
    """Holds training and test images with their labels, on any device.

    Attributes:
        name: what the data set is called in logs and reports.
        train: uint8 [N, C, H, W].
        train_labels: int64 [N], values 0 .. classes - 1.
        test: uint8 [M, C, H, W].
        test_labels: int64 [M], values 0 .. classes - 1.
        classes: number of classes.
        class_names: [classes]; the numbers themselves where none are given.
    """

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        check_int("classes", self.classes, 1)
        names = self.class_names or tuple(str(label) for label in range(self.classes))
        if len(names) != self.classes:
            raise ValueError(f"class_names are {len(names)}; {self.classes} are needed")
        object.__setattr__(self, "class_names", names)
        for part in ("train", "test"):
            check_bytes(part, getattr(self, part))
            labels = getattr(self, f"{part}_labels")
            if labels.dtype != torch.int64 or labels.shape != getattr(self, part).shape[:1]:
                raise ValueError(
                    f"{part}_labels are {labels.dtype} of shape {list(labels.shape)}; torch.int64"
                    f" of shape [{len(getattr(self, part))}] is needed"
                )

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.shape[1:]
        return channels, height, width

    @cached_property
    def pixel_moments(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        mean, std = moments(byte_counts(self.train))
        return mean.to(self.device), std.to(self.device)

    @cached_property
    def fingerprint(self) -> str:
        """Hashes all images and labels, by which a resumed run knows its data again."""
        found = hashlib.blake2b(digest_size=16)
        for part in (self.train, self.train_labels, self.test, self.test_labels):
            # The shape belongs to it: the same bytes in another shape are other images.
            found.update(f"{part.dtype} {list(part.shape)}".encode())
            found.update(part.cpu().contiguous().numpy().data)
        return found.hexdigest()

    def to(self, device: torch.device | str) -> Images:
        """Returns the same images with all four tensors on `device`."""
        return replace(
            self,
            train=self.train.to(device),
            train_labels=self.train_labels.to(device),
            test=self.test.to(device),
            test_labels=self.test_labels.to(device),
        )

    def subset(self, train: Tensor, test: Tensor) -> Images:
        return replace(
            self,
            train=self.train[train],
            train_labels=self.train_labels[train],
            test=self.train[test],
            test_labels=self.train_labels[test],
        )

    def stream(self, batches: Batches) -> Stream:
        return _Indexed(self, batches)

    def plain(self, index: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for part in index.split(size):
            yield part, self.train[part]

    def tests(self, size: int, share: Share = WHOLE) -> Iterator[tuple[Tensor, Tensor]]:
        test, labels = share.spread(self.test), share.spread(self.test_labels)
        return zip(test.split(size), labels.split(size))

    def resized(self, size: int) -> Images:
        """Brings every image to `size` x `size` pixels, see `resize`."""
        return replace(self, train=resize(self.train, size), test=resize(self.test, size))


class _Indexed(Stream):
    """Takes the images of each batch out of the tensor that holds them all."""

    def __init__(self, images: Images, batches: Batches) -> None:
        self.images, self.batches = images, batches

    def next(self) -> tuple[Tensor, Tensor]:
        index = to_device(self.batches.next(), self.images.device)
        return self.images.train[index], self.images.train_labels[index]

    def close(self) -> None:
        """Does nothing: no process reads ahead."""


@typed
def resize(images: Tensor, size: int) -> Tensor:
    """Scales the shorter side to `size` (bilinear, antialiased) and crops the centre to a square.

    Args:
        images: uint8 [N, C, H, W].
        size: side of the result in pixels.

    Returns:
        uint8 [N, C, size, size].
    """
    check_bytes("images", images)
    check_int("size", size, 1)
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    short = min(height, width)
    scaled = (round(height * size / short), round(width * size / short))
    top, left = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    parts = [
        F.interpolate(part.float(), scaled, mode="bilinear", antialias=True)[
            ..., top : top + size, left : left + size
        ]
        .round_()
        .clamp_(0, 255)
        .to(torch.uint8)
        for part in images.split(RESIZE_CHUNK)
    ]
    return torch.cat(parts)
