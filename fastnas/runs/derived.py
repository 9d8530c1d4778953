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
from fastnas.runs.cost import cost_figures, genotype_cost
from fastnas.search.config import GradientConfig, RunConfig, SearchConfig, TrainConfig
from fastnas.search.gradient_run import GradientRun
from fastnas.search.mobile_config import MobileConfig
from fastnas.search.trained import trained
from fastnas.search.trainer import CHECKPOINT, Trainer
from fastnas.spaces import AnyGenotype, MobileGenotype, Space, get_space
from fastnas.spaces.mobile_genotype import Architecture, mobile_space
from fastnas.strategies.derivation import derive_top_edges

BATCH_SIZE = 96
NAMES = {"batch_size": "train_batch_size", "lr": "train_lr"}
"""What a search calls the settings of the training, which a refusal has to name."""


def check_derived(config: GradientConfig, images: ImageSource) -> None:
    """Refuses, before a search begins, what its last stage would refuse.

    The training is built as it will be, of a cell or a column of convolutions: each ends in a batch
    norm, so what can be trained of it can be trained of every other of the space.

    Raises:
        ConfigError: naming the setting of the search.
    """
    if config.train_epochs:
        # What it returns is dropped: building it is what raises.
        derived_trainer(config, _convolutional(config), images)


def train_derived(
    config: GradientConfig,
    genotype: Architecture,
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
    trainer = derived_trainer(config, genotype, images)
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


def derived_trainer(config: GradientConfig, genotype: Architecture, images: ImageSource) -> Trainer:
    """Builds the training of a network that a search has derived.

    Raises:
        ConfigError: naming the setting of the search.
    """
    return Trainer(derived_config(config, genotype, images), genotype, images, NAMES)


def derived_config(
    config: GradientConfig, genotype: Architecture, images: ImageSource
) -> TrainConfig:
    """Returns the settings of the training, by those of the search."""
    shared = {name: getattr(config, name) for name in options_of(RunConfig)}
    return TrainConfig(
        **shared,
        **_sizes(config),
        genotype=trained(genotype).json,
        epochs=config.train_epochs,
        batch_size=config.train_batch_size or _usual_batch(len(images.train_labels)),
        lr=config.train_lr,
        cutout=config.cutout,
        test_every=0,
    )


def derived_cost(searcher: GradientRun, genotype: Architecture) -> dict[str, Any]:
    """Returns what the network of a genotype costs, of the sizes that the search trains it in."""
    images = searcher.images
    config = derived_config(searcher.config, genotype, images)
    return genotype_cost(
        genotype, config, images.shape, images.classes, searcher.precision, searcher.device
    )


def trained_cost(trainer: Trainer) -> dict[str, Any]:
    """Returns what the network of a training costs."""
    return cost_figures(
        trainer.network, trainer.genotype, trainer.config, trainer.images.shape, trainer.precision
    )


def _usual_batch(images: int) -> int:
    """Returns 96, or as many as there are, and as many for each process."""
    size = min(BATCH_SIZE, images)
    return size - size % here().size


def _sizes(config: GradientConfig) -> dict[str, Any]:
    """Returns the settings of the training that networks of cells and of columns differ in."""
    if isinstance(config, MobileConfig):
        return {
            "width": config.width,
            "stem_stride": config.stem_stride,
            "squeeze": config.squeeze,
            "activation": config.activation,
        }
    assert isinstance(config, SearchConfig)
    layers = config.resolved("train_layers")
    sizes = {"channels": config.train_channels, "layers": layers}
    return {**sizes, "drop_path": 0.0, "auxiliary": False}


def _convolutional(config: GradientConfig) -> Architecture:
    if isinstance(config, MobileConfig):
        space = mobile_space(config.width, config.stem_stride)
        column = tuple(space.candidates(layer)[0] for layer in space.layers)
        return MobileGenotype(column, config.width, config.stem_stride)
    assert isinstance(config, SearchConfig)
    return _convolutions(config.strategy().space(get_space(config.space)))


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
