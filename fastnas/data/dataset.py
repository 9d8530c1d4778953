"""Holds labelled images in memory as bytes: what every source of data is turned into."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnas.checks import check_fields, check_int, typed

# This is one grey level: a channel without contrast would otherwise divide by zero.
SMALLEST_STD = 1 / 255
# So many images are float at a time, four times as large as their bytes.
RESIZE_CHUNK = 512


class DataError(ValueError):
    """Tells in one line where a data set is wrong, what was found and what is expected."""


def check_bytes(name: str, images: Tensor) -> None:
    """Raises TypeError or ValueError unless `images` are uint8 [N, C, H, W]."""
    if images.dtype != torch.uint8:
        raise TypeError(f"{name} has dtype {images.dtype}; expected torch.uint8")
    if images.dim() != 4:
        raise ValueError(f"{name} has shape {list(images.shape)}; expected [N, C, H, W]")


def one_line(error: Exception) -> str:
    """Returns what the error says, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True, eq=False)
class Images:
    """Holds training and test images with their labels, on any device.

    Attributes:
        name: what the data set is called in logs and reports.
        train: uint8 [N, C, H, W].
        train_labels: int64 [N], values 0 .. classes - 1.
        test: uint8 [M, C, H, W].
        test_labels: int64 [M], values 0 .. classes - 1.
        classes: number of classes.
    """

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int

    def __post_init__(self) -> None:
        check_fields(self)
        check_int("classes", self.classes, 1)
        for part in ("train", "test"):
            check_bytes(part, getattr(self, part))
            labels = getattr(self, f"{part}_labels")
            if labels.dtype != torch.int64 or labels.shape != getattr(self, part).shape[:1]:
                raise ValueError(
                    f"{part}_labels are {labels.dtype} of shape {list(labels.shape)}; torch.int64"
                    f" of shape [{len(getattr(self, part))}] is needed"
                )

    @property
    def channels(self) -> int:
        """Returns C."""
        return self.train.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Returns (H, W) in pixels."""
        return self.train.shape[2], self.train.shape[3]

    @property
    def mean(self) -> Tensor:
        """Returns the mean of the training pixels, float32 [C], in units of 0..1."""
        return self._moments[0]

    @property
    def std(self) -> Tensor:
        """Returns the training pixels' deviation, float32 [C], at least 1/255, in units of 0..1."""
        return self._moments[1]

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        # Counting the 256 values is exact, so every device and thread count finds the same bits.
        counts = torch.stack(
            [
                torch.bincount(plane.reshape(-1), minlength=256).cpu()
                for plane in self.train.unbind(1)
            ]
        ).double()
        share = counts / counts.sum(1, keepdim=True)
        values = torch.arange(256, dtype=torch.float64) / 255
        mean = share @ values
        variance = (share * (values - mean[:, None]) ** 2).sum(1)
        std = variance.sqrt().clamp(min=SMALLEST_STD)
        device = self.train.device
        return mean.float().to(device), std.float().to(device)

    @cached_property
    def fingerprint(self) -> str:
        """Hashes all images and labels, by which a resumed run knows its data again."""
        found = hashlib.blake2b(digest_size=16)
        for part in (self.train, self.train_labels, self.test, self.test_labels):
            # The shape belongs to it: the same bytes in another shape are other images.
            found.update(f"{part.dtype} {list(part.shape)}".encode())
            found.update(part.cpu().contiguous().numpy().data)
        return found.hexdigest()

    @typed
    def normalise(self, batch: Tensor) -> Tensor:
        """Returns (batch / 255 - mean) / std.

        Args:
            batch: uint8 [..., C, H, W].

        Returns:
            float32 of the same shape, on the batch's device.

        Raises:
            TypeError: if the batch is not uint8.
            ValueError: if its channels are not those of the data.
        """
        if batch.dtype != torch.uint8:
            raise TypeError(f"batch has dtype {batch.dtype}; expected torch.uint8")
        if batch.dim() < 3 or batch.shape[-3] != self.channels:
            raise ValueError(
                f"batch has shape {list(batch.shape)}; expected [..., {self.channels}, H, W]"
            )
        mean, std = (m.to(batch.device)[:, None, None] for m in (self.mean, self.std))
        # The division is in place on the copy that `float` has made; the bytes stay as they are.
        return batch.float().div_(255).sub_(mean).div_(std)

    def to(self, device: torch.device | str) -> Images:
        """Returns the same images with all four tensors on `device`."""
        return replace(
            self,
            train=self.train.to(device),
            train_labels=self.train_labels.to(device),
            test=self.test.to(device),
            test_labels=self.test_labels.to(device),
        )

    def resized(self, size: int) -> Images:
        """Brings every image to `size` x `size` pixels, see `resize`."""
        return replace(self, train=resize(self.train, size), test=resize(self.test, size))


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
