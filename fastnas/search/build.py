"""Builds what searching and training have alike: device, data, batches, learning rate."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fastnas.backends import OPS, choose
from fastnas.checks import short
from fastnas.data.augment import Augment
from fastnas.data.batches import split_indices
from fastnas.data.load import load_images
from fastnas.data.source import ImageSource, Stream
from fastnas.processes import WHOLE, Processes, Share, here, local_rank
from fastnas.search.config import ConfigError, RunConfig
from fastnas.strategies.precision import Precision
from fastnas.text_file import file_path

DEVICES = re.compile(r"cpu|cuda(:[0-9]{1,3})?")
EVALUATION_IMAGES = 4096
"""The most whose statistics a path is validated with, or that a cell is evaluated on."""
# Mirroring an image changes what it shows, or is not done in the published settings.
NOT_MIRRORED = {"digits", "svhn"}


def pick_device(name: str) -> torch.device:
    """Returns the device of that name, CUDA for "auto" where there is one.

    Raises:
        ConfigError: the device is not there.
    """
    given = name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and here().size > 1:
        name = f"cuda:{local_rank()}"
    # torch.device takes cpu:7 too, and computes on the one CPU there is.
    if not DEVICES.fullmatch(name):
        raise ConfigError(f"device is {short(name)}; cpu, cuda, cuda:N and auto are allowed")
    if here().size > 1 and ":" in given:
        raise ConfigError(f"device is {given!r}; of several processes each has a GPU of its own")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device is {name!r}; there are {torch.cuda.device_count()} CUDA devices")
    return device


def seeded(config: RunConfig) -> torch.device:
    """Seeds and sizes the process for a run; returns its device."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    random.seed(config.seed)
    # numpy takes seeds of 32 bits; a run may have up to 63.
    np.random.seed(config.seed % 2**32)  # noqa: NPY002
    return pick_device(config.device)


def run_precision(config: RunConfig, device: torch.device) -> Precision:
    """Returns the precision of a run; ConfigError where the device does not have it."""
    try:
        return Precision(config.precision, device, here())
    except ValueError as error:
        raise ConfigError(str(error)) from error


def run_backend(device: torch.device, precision: Precision) -> str:
    """Names the backend that computes a search; BackendError where the one asked for cannot."""
    found = choose(OPS["mixed_sum"], device, torch.float32)
    # The cells alone are cast by autocast; where a backend has none of its own, others compute
    # them.
    if precision.dtype is None or found in OPS["mixed_edges"].absent:
        return found
    return choose(OPS["mixed_edges"], device, precision.dtype)


def load_data(config: RunConfig, device: torch.device) -> ImageSource:
    def load() -> ImageSource:
        return load_images(
            config.data,
            data_dir=file_path(config.data_dir),
            image_size=config.image_size,
            workers=config.workers,
            crop_scale=config.crop_scale,
            centre_share=config.centre_share,
        )

    processes = here()
    # A data set that is not there yet is fetched, by one process and not by all at once.
    first = load() if processes.is_first else None
    processes.wait()
    return (load() if first is None else first).to(device)


def augmentation(config: RunConfig, images: ImageSource, cutout: int) -> Augment:
    """Returns the augmentation: by default crop 1 for digits, crop 4 and flips for photographs.

    Images that are random crops already are not shifted besides.

    Raises:
        ConfigError: wherever its middle is, `cutout` covers a whole image.
    """
    usual = 1 if images.name == "digits" else 0 if images.draws_crops else 4
    crop = usual if config.crop is None else config.crop
    flip = images.name not in NOT_MIRRORED if config.flip is None else config.flip
    side = min(images.size)
    if cutout >= 2 * side:
        raise ConfigError(
            f"cutout is {cutout}; below {2 * side} is needed for images of"
            f" {images.size[0]}x{images.size[1]} pixels, of which nothing would be left"
        )
    return Augment(crop=crop, flip=flip, cutout=cutout)


def chosen_images(images: ImageSource, count: int | None, seed: int) -> Tensor:
    """Chooses `count` training images, the same mix of classes, by index; None: all of them."""
    labels = images.train_labels.cpu()
    if count is None or count >= len(labels):
        return torch.arange(len(labels))
    return split_indices(labels, count / len(labels), seed)[0]


def some_of(index: Tensor, batch: int, seed: int) -> Tensor:
    """Draws at most EVALUATION_IMAGES, in whole batches, so that all images weigh the same."""
    some = min(EVALUATION_IMAGES, len(index))
    some -= some % batch if some >= batch else 0
    generator = torch.Generator().manual_seed(seed)
    return index[torch.randperm(len(index), generator=generator)[:some]]


@dataclass
class Pipeline:
    """Makes batches of augmented, normalised images, all on the device."""

    images: ImageSource
    augment: Augment
    generator: torch.Generator
    channels_last: bool = False
    share: Share = WHOLE

    def __post_init__(self) -> None:
        # Images are padded before they are normalised, as in the public code: black, not grey.
        self._fill = -self.images.mean / self.images.std

    def __call__(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """Returns the next images of a stream, augmented, and their labels."""
        pixels, labels = stream.next()
        pixels = self.images.normalise(pixels)
        batch = self.augment(pixels, self.generator, fill=self._fill, share=self.share)
        return self.laid_out(batch), labels

    def laid_out(self, batch: Tensor) -> Tensor:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return batch.contiguous(memory_format=layout)


def check_batch_size(setting: str, size: int, images: int, use: str, share: Share = WHOLE) -> None:
    """Refuses a batch for which there are too few images, or that processes cannot share.

    Args:
        setting: what the user calls the batch size.
        use: what the images are for.
        share: the part of a batch that a process has.

    Raises:
        ConfigError: there are fewer images than a batch has, or the parts would not be equal.
    """
    if size % share.size:
        raise ConfigError(
            f"{setting} is {size}; a multiple of {share.size}, the number of processes that share"
            " a batch, is needed"
        )
    if size > images:
        raise ConfigError(f"{setting} is {size}; at most {images} is allowed, the images {use}")


def check_batch_norms(
    setting: str, size: int, image: Sequence[int], run: Callable[[Tensor], object]
) -> None:
    """Refuses a batch of one image that a batch norm cannot be trained on.

    Batch norm in training needs two values per channel, and a network brings small images down to
    one. Two images are two values whatever their size. Of one, the shapes are followed through the
    network on the device "meta", which computes nothing.

    Args:
        setting: what the user calls the batch size.
        image: its shape, [C, H, W].
        run: builds the network, on torch's default device, and passes images [1, C, H, W].

    Raises:
        ConfigError: a batch norm would see one value per channel.
    """
    if size > 1:
        return
    try:
        # A network that draws while it is built must not move the generators of the run.
        with torch.random.fork_rng([]), torch.device("meta"):
            run(torch.empty(size, *image))
    except ValueError as error:
        pixels = "x".join(map(str, image[1:]))
        raise ConfigError(
            f"{setting} is {size}; at least 2 is needed for images of {pixels} pixels, of which a"
            " batch norm of the network sees a single value per channel"
        ) from error


def in_channels_last(network: nn.Module) -> None:
    """Lays the convolution weights out channels last, in place."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def cosine(epoch: int, epochs: int, start: float, end: float) -> float:
    """Returns an epoch's learning rate, from `start` to `end` along half a cosine (SGDR)."""
    # This is equation 5 of SGDR, with one period and no restart.
    return end + (start - end) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the share of right answers, float64 [] on their device."""
    return (logits.argmax(-1) == labels).double().mean()


class Answers:
    """Counts the right answers over the batches of a test, without waiting for the device.

    Attributes:
        right: int64 [], of several paths int64 [paths].
        finite: bool [], whether every logit was finite.
    """

    def __init__(self, device: torch.device) -> None:
        self.right = torch.zeros((), dtype=torch.int64, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Counts a batch: logits [N, classes] or [paths, N, classes], and labels [N]."""
        # Labels [N] are compared along a leading axis of paths, where there is one.
        self.right = self.right + (logits.argmax(-1) == labels).sum(-1)
        self.finite = self.finite & logits.isfinite().all()

    def join(self, processes: Processes) -> None:
        """Adds up what the processes have counted, each on its own images."""
        self.right = processes.total(self.right)
        self.finite = processes.total((~self.finite).long()) == 0
