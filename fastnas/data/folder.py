"""Hands out the pictures of a folder, which are read whenever they are needed, never all held."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastnas.data.batches import Batches, split_indices
from fastnas.data.listing import Pictures, list_folder
from fastnas.data.npz import HELD_BACK, HELD_BACK_SEED
from fastnas.data.picture import GREY, Reading, header_mode
from fastnas.data.reading import PictureReader, PictureStream
from fastnas.data.source import DataError, ImageSource, Stream, byte_counts, moments
from fastnas.processes import WHOLE, Share

DECODED_BYTES = 256 << 20
"""Folders of at most so many bytes are decoded once before a run, in about ten seconds."""
SAMPLED = 4096
"""Training pictures of a larger folder whose pixels give mean and std."""
OPENED = 100_000
"""Folders of at most so many pictures have every header read; of larger ones only as many as it
takes to find one in colour."""
AT_ONCE = 64

Moments = tuple[Tensor, Tensor]


class FolderImages(ImageSource):
    """Hands out the pictures of a folder.

    Args:
        classes: the names of its classes.
        train, test: its pictures.
        reading: what becomes of each.
        workers: processes for each stream of pictures; 0: they are read where they are needed.
        found: mean and std of the training pictures.
    """

    def __init__(
        self,
        name: str,
        classes: tuple[str, ...],
        train: Pictures,
        test: Pictures,
        reading: Reading,
        workers: int,
        found: Moments,
    ) -> None:
        self.name, self.class_names, self.classes = name, classes, len(classes)
        self.train, self.test, self.reading, self.workers = train, test, reading, workers
        self.train_labels, self.test_labels = train.labels, test.labels
        self.pixel_moments = found

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.reading.channels, self.reading.size, self.reading.size

    @property
    def draws_crops(self) -> bool:
        return self.reading.crop_scale < 1

    @property
    def fingerprint(self) -> str:
        """Hashes names, sizes in bytes and labels of all pictures, and how they are read.

        Their contents are left out: a large folder is read once an epoch, not once more to begin.
        """
        found = hashlib.blake2b(repr(self.reading).encode(), digest_size=16)
        for part in (self.train, self.test):
            for column in (part.ends, part.labels.numpy(), part.sizes):
                found.update(column.data)
            found.update(part.names)
        return found.hexdigest()

    def to(self, device: torch.device | str) -> FolderImages:
        found = copy.copy(self)
        found.train_labels = self.train_labels.to(device)
        found.test_labels = self.test_labels.to(device)
        found.pixel_moments = self.mean.to(device), self.std.to(device)
        return found

    def subset(self, train: Tensor, test: Tensor) -> FolderImages:
        """Returns training pictures of these; mean and std stay those of all of them."""
        found = copy.copy(self)
        found.train, found.test = self.train.chosen(train), self.train.chosen(test)
        found.train_labels, found.test_labels = self.train_labels[train], self.train_labels[test]
        return found

    def stream(self, batches: Batches) -> Stream:
        reader = PictureReader(self.train, self.reading)
        return PictureStream(reader, batches, self.train_labels, self.workers)

    def plain(self, index: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        reader = PictureReader(self.train, self.reading)
        found = reader.plain(index, size, self.workers)
        for part, pixels in zip(index.split(size), found, strict=True):
            yield part, pixels.to(self.device)

    def tests(self, size: int, share: Share = WHOLE) -> Iterator[tuple[Tensor, Tensor]]:
        reader = PictureReader(self.test, self.reading)
        found = reader.plain(share.spread(torch.arange(len(self.test))), size, self.workers)
        mine = share.spread(self.test_labels)
        for labels, pixels in zip(mine.split(size), found, strict=True):
            yield pixels.to(self.device), labels


def read_folder(
    root: Path, size: int, workers: int, crop_scale: float, centre_share: float
) -> FolderImages:
    """Lists a folder of pictures, and reads as much of it as a run should know beforehand.

    Raises:
        DataError: as `list_folder`; or a picture that was read cannot be.
    """
    listing = list_folder(root)
    train, test = listing.train, listing.test
    if test is None:
        train, test = _split(root, train, listing.classes)
    channels = 1 if _is_grey(train, test) else 3
    reading = Reading(size, channels, crop_scale, centre_share)
    found = _moments(train, test, reading, workers)
    # The whole path: a folder that is called digits is not that data set.
    name = str(root.resolve())
    return FolderImages(name, listing.classes, train, test, reading, workers, found)


def _split(root: Path, pictures: Pictures, classes: tuple[str, ...]) -> tuple[Pictures, Pictures]:
    """Holds a fifth of each class back for the test, the same whatever the seed of a run is."""
    counts = torch.bincount(pictures.labels)
    few = int(counts.argmin())
    if counts[few] < 2 or len(pictures) * HELD_BACK < 1:
        raise DataError(
            f"{root}: {int(counts[few])} picture of class {classes[few]}, {len(pictures)} in all;"
            " to hold back a fifth for the test, expected 2 of each class and 5 in all"
        )
    test, train = split_indices(pictures.labels, HELD_BACK, HELD_BACK_SEED)
    held = torch.bincount(pictures.labels[test], minlength=len(classes))
    # A fifth of a few may be none, and then nobody would hear how well the class is known.
    lacking = [train[pictures.labels[train] == k][:1] for k in (held == 0).nonzero().flatten()]
    test = torch.cat([test, *lacking]).sort().values
    train = train[~torch.isin(train, test)]
    return pictures.chosen(train), pictures.chosen(test)


def _is_grey(*parts: Pictures) -> bool:
    """Reads headers, of small folders all, and tells whether every picture is grey."""
    everything = sum(map(len, parts)) <= OPENED
    grey = True
    for part in parts:
        for number in range(len(part)):
            grey = header_mode(part.path(number)) in GREY and grey
            if not (grey or everything):
                return False
    return grey


def _moments(train: Pictures, test: Pictures, reading: Reading, workers: int) -> Moments:
    """Returns mean and std of training pictures, cut as for a test: of all, or of a sample.

    Pictures that cannot be decoded are found here where the folder is small, those of the test
    among them.
    """
    reader = PictureReader(train, reading)
    index = torch.arange(len(train))
    if int(train.sizes.sum() + test.sizes.sum()) <= DECODED_BYTES:
        everything = torch.arange(len(test))
        for _ in PictureReader(test, reading).plain(everything, AT_ONCE, workers):
            pass
    elif len(train) > SAMPLED:
        index = split_indices(train.labels, SAMPLED / len(train), HELD_BACK_SEED)[0]
    counts = torch.zeros(reading.channels, 256, dtype=torch.int64)
    for pixels in reader.plain(index, AT_ONCE, workers):
        counts += byte_counts(pixels)
    return moments(counts)
