"""Computes the validation loss and accuracy around the logits that a search has found."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from fastnas.files import write_text
from fastnas.nn import Paths, SearchNetwork
from fastnas.nn.paths import Weights
from fastnas.report.landscape_drawing import draw_landscape
from fastnas.runs.landscape_settings import LandscapeSettings
from fastnas.search.config import ConfigError
from fastnas.search.opened import open_search
from fastnas.search.progress import StepBar
from fastnas.search.recalibrate import recalibrated
from fastnas.search.searcher import Searcher

FILES = ("landscape.csv", "landscape.png", "landscape.svg")


class Landscape(NamedTuple):
    """Holds a grid of losses and accuracies, the first axis along the first direction.

    Attributes:
        offsets: S of each direction.
        loss: mean cross entropy in nats, float64 [S, S].
        accuracy: share of images, float64 [S, S].
        images: how many of them.
    """

    offsets: list[float]
    loss: Tensor
    accuracy: Tensor
    images: int


def leave_landscape(
    run: Path, settings: LandscapeSettings, *, force: bool = False, console: Console
) -> Landscape:
    """Writes landscape.csv, landscape.png and landscape.svg into the folder of a finished search.

    Raises:
        ConfigError: the folder holds no search, or one that is not finished; a landscape is there
            and `force` is off; or the images or logits do not allow one.
        CheckpointError, DataError, BackendError: as `open_search`.
    """
    there = [name for name in FILES if os.path.lexists(run / name)]
    if there and not force:
        raise ConfigError(f"{run / there[0]} exists; --force replaces it")
    searcher = open_search(run, settings.device)
    if not searcher.finished:
        raise ConfigError(
            f"{run} holds a search that is not finished: {searcher.epoch} of {searcher.epochs}"
            " epochs are done"
        )
    found = landscape(searcher, settings, console)
    write_text(run / FILES[0], _table(found))
    for name in FILES[1:]:
        draw_landscape(found.offsets, found.loss, found.accuracy, run / name)
    centre = f"{len(found.offsets)} x {len(found.offsets)} points on {found.images} images"
    console.print(
        f"landscape of {run}: {centre}, loss {float(found.loss.min()):.3f} to"
        f" {float(found.loss.max()):.3f}, accuracy {float(found.accuracy.min()):.3f} to"
        f" {float(found.accuracy.max()):.3f}; {', '.join(FILES)}"
    )
    return found


@torch.no_grad()
def landscape(searcher: Searcher, settings: LandscapeSettings, console: Console) -> Landscape:
    """Computes how the supernet does at logits alpha + x d1 + y d2, x and y from -extent to extent.

    The weights are those that the search ended with, in eval mode; of a method that samples paths
    each point is its likeliest path, with statistics taken anew, as the search validates it.

    Raises:
        ConfigError: there are too few images, or the logits of a cell have no direction.
    """
    available = len(searcher.evaluation_index)
    count = available if settings.images is None else settings.images
    if count > available:
        raise ConfigError(f"images is {count}; at most {available} is allowed, those of the logits")
    names = [name for name, _ in searcher.arch.named_parameters()]
    here = [p.detach().clone() for p in searcher.arch.parameters()]
    first, second = directions(dict(zip(names, here)), settings.seed)
    offsets = torch.linspace(-settings.extent, settings.extent, settings.steps).double().tolist()
    index = searcher.evaluation_index[:count]
    # They are held as bytes, so that a folder of pictures is read once and not for every point.
    batches = list(searcher.pipeline.images.plain(index, 4 * searcher.train_batches.batch_size))
    loss, accuracy = (torch.empty(2, len(offsets), len(offsets), dtype=torch.float64)).unbind()
    with (
        searcher.on_backend(),
        _put_back(searcher),
        StepBar(console, "landscape", len(offsets) ** 2, 0) as bar,
    ):
        for i, x in enumerate(offsets):
            for j, y in enumerate(offsets):
                for p, origin, d, e in zip(searcher.arch.parameters(), here, first, second):
                    p.copy_(origin.double() + x * d.to(p.device) + y * e.to(p.device))
                loss[i, j], accuracy[i, j] = _validated(searcher, batches, count)
                bar.advance(1, f"loss {float(loss[i, j]):.3f}")
    return Landscape(offsets, loss, accuracy, count)


def directions(logits: Mapping[str, Tensor], seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Returns two directions in the logits, float64 on the CPU, a tensor for each of theirs.

    Each is drawn from N(0, 1), the second made orthogonal to the first, and both scaled to the
    norm of the logits: all three for the logits of each cell by themselves (the filter
    normalisation of Li et al., NeurIPS 2018, with a cell in place of a filter).

    Raises:
        ConfigError: logits are all 0, or a single one.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for name, alpha in logits.items():
        norm = float(alpha.double().norm())
        if norm == 0 or alpha.numel() < 2:
            why = "are all 0, which gives no scale" if norm == 0 else "are one number"
            raise ConfigError(f"the logits {name} {why}; a landscape needs two directions")
        d, e = torch.randn(2, *alpha.shape, generator=generator, dtype=torch.float64)
        # Divided by the squared norm of d, or the rest is not orthogonal to it.
        e = e - (d * e).sum() / d.square().sum() * d
        pairs.append((norm / d.norm() * d, norm / e.norm() * e))
    return [d for d, _ in pairs], [e for _, e in pairs]


def _validated(
    searcher: Searcher, batches: Sequence[tuple[Tensor, Tensor]], count: int
) -> tuple[float, float]:
    """Returns the loss and the accuracy of the logits as they are."""
    weights = searcher.validation_weights()
    network = _prepared(searcher, weights).eval()
    images = searcher.pipeline.images
    loss = torch.zeros((), dtype=torch.float64, device=searcher.device)
    right = torch.zeros((), dtype=torch.int64, device=searcher.device)
    for index, pixels in batches:
        labels = images.train_labels[index]
        with searcher.precision.autocast():
            out = network(searcher.pipeline.laid_out(images.normalise(pixels)), weights)
        loss += F.cross_entropy(out.double(), labels, reduction="sum")
        right += (out.argmax(-1) == labels).sum()
    return float(loss) / count, int(right) / count


def _prepared(searcher: Searcher, weights: Weights) -> SearchNetwork:
    if not any(isinstance(w, Paths) for w in weights.values()):
        return searcher.network
    batches = (batch for _, batch in searcher.plain(searcher.recalibration_index))
    with searcher.precision.autocast():
        return recalibrated(searcher.network, weights, batches)


@contextmanager
def _put_back(searcher: Searcher) -> Iterator[None]:
    """Leaves the searcher with the logits and the mode that it had."""
    saved = [p.detach().clone() for p in searcher.arch.parameters()]
    training = searcher.network.training
    try:
        yield
    finally:
        searcher.network.train(training)
        for p, value in zip(searcher.arch.parameters(), saved):
            p.copy_(value)


def _table(found: Landscape) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["x", "y", "loss", "accuracy"])
    for i, x in enumerate(found.offsets):
        for j, y in enumerate(found.offsets):
            row = (x, y, float(found.loss[i, j]), float(found.accuracy[i, j]))
            writer.writerow([f"{value:.9g}" for value in row])
    return text.getvalue()
