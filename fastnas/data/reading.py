"""Reads batches of pictures, in worker processes that run ahead, to the same bits as without."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastnas.data.batches import Batches
from fastnas.data.listing import Pictures
from fastnas.data.picture import Bytes, Reading, read_picture
from fastnas.data.source import DataError, Stream
from fastnas.data.workers import begin_worker, deaths_told
from fastnas.transfer import to_device

AHEAD = 2
"""Batches that each worker has read, or is reading, before they are asked for."""


class Request(NamedTuple):
    """Names the pictures of a batch.

    Attributes:
        numbers: theirs; plain ints, as tensors would travel through shared memory.
        pass_key: of the pass that they are in (`Batches.pass_key`); None: nothing is drawn.
    """

    numbers: list[int]
    pass_key: int | None


class PictureReader(Dataset[Tensor | str]):
    """Reads the pictures of a request as uint8 [B, C, size, size], or tells why it cannot.

    A crop follows from the pass and the picture alone: no generator is shared, so it is the same
    whichever process reads it, and after a run has been resumed.
    """

    def __init__(self, pictures: Pictures, reading: Reading) -> None:
        self.pictures, self.reading = pictures, reading

    def __getitem__(self, request: Request) -> Tensor | str:
        try:
            pixels = [self._read(number, request.pass_key) for number in request.numbers]
            return torch.from_numpy(np.stack(pixels))
        except DataError as error:
            # Raised in a worker, it would arrive as a page that ends in a traceback.
            return str(error)

    def _read(self, number: int, pass_key: int | None) -> Bytes:
        rng = None if pass_key is None else np.random.default_rng((pass_key, number))
        return read_picture(self.pictures.path(number), self.reading, rng)

    def batches(self, requests: Iterable[Request], workers: int) -> Generator[Tensor, None, None]:
        """Yields the batches of requests, in their order.

        Raises:
            DataError: a picture cannot be read, or a worker has died.
        """
        loader = DataLoader(
            self,
            batch_size=None,  # a request is a batch already
            sampler=requests,
            num_workers=workers,
            prefetch_factor=AHEAD if workers else None,
            collate_fn=_as_it_is,
            worker_init_fn=begin_worker,
            # Without one, each loader draws from the generator of the run, and when loaders are
            # made depends on when it was resumed.
            generator=torch.Generator(),
        )
        with deaths_told():
            for found in loader:
                if isinstance(found, str):
                    raise DataError(found)
                yield found

    def plain(self, index: Tensor, size: int, workers: int) -> Iterator[Tensor]:
        """Yields the pictures of an index [K] as a test sees them, `size` at a time."""
        requests = (Request(part.tolist(), None) for part in index.cpu().split(size))
        return self.batches(requests, min(workers, -(-len(index) // size)))


class PictureStream(Stream):
    """Reads ahead of `batches`: their position says what is asked for next, not what is read.

    Args:
        labels: int64 [N], on the device of the run.
    """

    def __init__(
        self, reader: PictureReader, batches: Batches, labels: Tensor, workers: int
    ) -> None:
        self.reader, self.batches, self.labels, self.workers = reader, batches, labels, workers
        self._read: Generator[Tensor, None, None] | None = None
        self._place: tuple[int, int] | None = None
        """Of the batches, for which `_read` has the next one."""

    def next(self) -> tuple[Tensor, Tensor]:
        if self._read is None or self.batches.place != self._place:  # a checkpoint was loaded
            self.close()
            self._read = self.reader.batches(_requests(self.batches.ahead()), self.workers)
        index = self.batches.next()
        pixels = next(self._read)
        self._place = self.batches.place
        device = self.labels.device
        return to_device(pixels, device), self.labels[to_device(index, device)]

    def close(self) -> None:
        if self._read is not None:
            self._read.close()  # and with it the loader's iterator, whose workers then end
        self._read = None


def _requests(ahead: Batches) -> Iterator[Request]:
    while True:
        # The key is read after `next`, which may have begun another pass.
        numbers = ahead.next().tolist()
        yield Request(numbers, ahead.pass_key)


def _as_it_is(found: Any) -> Any:
    return found
