"""Says what a run asks of its images, whether they lie in memory or are read as they are needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from fastnas.checks import typed
from fastnas.data.batches import Batches
from fastnas.processes import WHOLE, Share

# This is one grey level: a channel without contrast would otherwise divide by zero.
SMALLEST_STD = 1 / 255


class DataError(ValueError):
    """Tells in one line where a data set is wrong, what was found and what is expected."""


def one_line(error: Exception) -> str:
    """Returns what the error says, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


class Stream(ABC):
    """Hands out training images without end, in the order of its `Batches`."""

    @abstractmethod
    def next(self) -> tuple[Tensor, Tensor]:
        """Returns the next uint8 [B, C, H, W] and int64 [B], on the device of the images."""

    @abstractmethod
    def close(self) -> None:
        """Ends the processes that read ahead, if there are any; `next` starts them anew."""


class ImageSource(ABC):
    """Hands out the labelled images of a data set as bytes.

    Attributes:
        name: what the data set is called in logs and reports.
        classes: their number.
        class_names: [classes], in the order of the labels.
        train_labels, test_labels: int64 [N] and [M] on `device`, values 0 .. classes - 1.
        pixel_moments: `mean` and `std`.
    """

    name: str
    classes: int
    class_names: tuple[str, ...]
    train_labels: Tensor
    test_labels: Tensor
    pixel_moments: tuple[Tensor, Tensor]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """Returns (C, H, W) of every image."""

    @property
    def mean(self) -> Tensor:
        """Returns the mean of the training pixels, float32 [C], in units of 0..1."""
        return self.pixel_moments[0]

    @property
    def std(self) -> Tensor:
        """Returns the training pixels' deviation, float32 [C], at least 1/255, in units of 0..1."""
        return self.pixel_moments[1]

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Returns a hash by which a resumed run knows its data again."""

    @abstractmethod
    def to(self, device: torch.device | str) -> ImageSource:
        """Returns the same images, handed out on `device`."""

    @abstractmethod
    def subset(self, train: Tensor, test: Tensor) -> ImageSource:
        """Returns training images of these by their int64 indices, some to train and some to test.

        The test images of these are in neither.
        """

    @abstractmethod
    def stream(self, batches: Batches) -> Stream:
        """Returns the training images in the order of `batches`, which hold the position."""

    @abstractmethod
    def plain(self, index: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields training images as a test would see them.

        Args:
            index: int64 [K] on `device`.
            size: images at a time.

        Yields:
            The part of the index, int64 [B], and uint8 [B, C, H, W], on `device`.
        """

    @abstractmethod
    def tests(self, size: int, share: Share = WHOLE) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields all test images, uint8 [B, C, H, W], with int64 [B], `size` at a time.

        Args:
            share: of several processes; each gets another part of the images.
        """

    @property
    def draws_crops(self) -> bool:
        """Tells whether training images are crops that are drawn anew in each pass."""
        return False

    @property
    def channels(self) -> int:
        """Returns C."""
        return self.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """Returns (H, W) in pixels."""
        return self.shape[1:]

    @property
    def device(self) -> torch.device:
        """Returns where the images are handed out."""
        return self.train_labels.device

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


def byte_counts(images: Tensor) -> Tensor:
    """Counts each of the 256 values in each channel of uint8 [N, C, H, W]; int64 [C, 256]."""
    planes = (torch.bincount(plane.reshape(-1), minlength=256) for plane in images.unbind(1))
    return torch.stack([counts.cpu() for counts in planes])


def moments(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean and the deviation, float32 [C], of what `byte_counts` has counted."""
    # Counting is exact, so every device, number of threads and of workers finds the same bits.
    share = counts.double() / counts.double().sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ values
    variance = (share * (values - mean[:, None]) ** 2).sum(1)
    return mean.float(), variance.sqrt().clamp(min=SMALLEST_STD).float()
