"""Runs the last stage of a search: the short training of the network that it derived."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fastnas.data.source import ImageSource
from fastnas.options import options_of
from fastnas.processes import here
from fastnas.search.config import RunConfig, SearchConfig, TrainConfig
from fastnas.search.trainer import CHECKPOINT, Trainer
from fastnas.spaces import AnyGenotype, Space, get_space, to_json
from fastnas.strategies.derivation import derive_top_edges

BATCH_SIZE = 96
NAMES = {"batch_size": "train_batch_size", "lr": "train_lr"}
"""What a search calls the settings of the training, which a refusal has to name."""


def check_derived(config: SearchConfig, images: ImageSource) -> None:
    """Refuses, before a search begins, what its last stage would refuse.

    The training is built as it will be, of a cell of convolutions: each ends in a batch norm, so
    what can be trained of it can be trained of every cell of the space.

    Raises:
        ConfigError: naming the setting of the search.
    """
    if config.train_epochs:
        space = config.strategy().space(get_space(config.space))
        # What it returns is dropped: building it is what raises.
        _trainer(config, _convolutions(space), images)


def train_derived(
    config: SearchConfig,
    genotype: AnyGenotype,
    images: ImageSource,
    out: Path,
    resume: bool,
    console: Console,
) -> dict[str, Any]:
    """Trains the network of a genotype; returns what the report says of it, None if it is off.

    Args:
        images: those of the search.
        resume: go on with the training that `out` holds, if any.

    Raises:
        CheckpointError, DivergedError: as `Trainer`.
    """
    if config.train_epochs == 0:
        return dict.fromkeys(("test_accuracy", "train_epochs", "train_seconds", "test_images"))
    trainer = _trainer(config, genotype, images)
    checkpoint = out / CHECKPOINT
    # The folder is that of the search, so `run_folder` has compared its settings already; `resume`
    # compares those of the training with its checkpoint.
    if resume and checkpoint.exists():
        trainer.resume(checkpoint)
    console.print(f"training the derived network, {trainer.parameters:,} parameters", style="bold")
    if not trainer.finished:
        trainer.train(out, console)
    return {
        "test_accuracy": trainer.history[-1]["test_accuracy"],
        "train_epochs": config.train_epochs,
        "train_seconds": trainer.seconds,
        "test_images": len(images.test_labels),
    }


def _trainer(config: SearchConfig, genotype: AnyGenotype, images: ImageSource) -> Trainer:
    shared = {name: getattr(config, name) for name in options_of(RunConfig)}
    settings = TrainConfig(
        **shared,
        genotype=to_json(genotype),
        channels=config.train_channels,
        layers=config.resolved("train_layers"),
        epochs=config.train_epochs,
        batch_size=config.train_batch_size or _usual_batch(len(images.train_labels)),
        lr=config.train_lr,
        cutout=config.cutout,
        drop_path=0.0,
        auxiliary=False,
        test_every=0,
    )
    return Trainer(settings, genotype, images, NAMES)


def _usual_batch(images: int) -> int:
    """Returns 96, or as many as there are, and as many for each process."""
    size = min(BATCH_SIZE, images)
    return size - size % here().size


def _convolutions(space: Space) -> AnyGenotype:
    """Returns a cell with convolutions wherever the space offers one."""

    def preference(names: tuple[str, ...]) -> list[float]:
        # This ranks a convolution before any other operation, and anything before `none`.
        return [float("conv" in name) - (name == "none") for name in names]

    weights: dict[str, Tensor] = {
        cell: torch.tensor([preference(names) for names in space.candidates(cell)])
        for cell in space.cell_types
    }
    return derive_top_edges(weights, space)
