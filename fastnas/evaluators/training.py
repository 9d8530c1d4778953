"""Evaluates cells by training each from scratch for a few epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from fastnas.data.batches import split_indices
from fastnas.evaluators.base import Evaluation, EvaluationError, EvaluatorOptions
from fastnas.options import option
from fastnas.search.build import chosen_images, load_data, pick_device
from fastnas.search.config import ConfigError, TrainConfig, make_config, read_settings
from fastnas.search.progress import plain_console
from fastnas.search.trainer import Trainer
from fastnas.spaces import AnyGenotype, get_space
from fastnas.spaces.distribution import OperationDistribution, slots_of
from fastnas.spaces.slots import LENGTH, SlotLayout
from fastnas.text_file import file_path

TRAIN_SHARE = 0.8
"""Of the training images; the others evaluate. The test images are not looked at."""
NOT_HERE = ("genotype", "out", "checkpoint_every", "tensorboard", "test_every")
"""Settings of `fastnas train` without a meaning where only an accuracy is left."""
OF_THE_MACHINE = ("data_dir", "device", "threads", "workers")


class TrainingEvaluator:
    """Trains each cell on 80 % of the training images; its accuracy is that on the rest.

    Args:
        config: of the trainings; its seed chooses the images that evaluate, the evaluation's seed
            all else.
        layout: of the cells.

    Raises:
        ConfigError, DataError: the config cannot be run on this machine.
    """

    def __init__(self, config: TrainConfig, layout: SlotLayout) -> None:
        config.validate()
        self.layout = layout
        images = load_data(config, pick_device(config.device))
        chosen = chosen_images(images, config.images, config.seed)
        labels = images.train_labels.cpu()[chosen]
        try:
            train, held = (chosen[i] for i in split_indices(labels, TRAIN_SHARE, config.seed))
        except ValueError as error:
            raise ConfigError(f"{len(chosen)} images are too few: {error}") from error
        # What `Trainer` tests on is what a study optimises, so it must not be the test images.
        self.images = images.subset(train, held)
        # The images are chosen already; a training writes nothing and tests once, at its end.
        self.config = replace(config, images=None, tensorboard=False, test_every=0)
        training = {
            name: value
            for name, value in config.settings().items()
            # Workers on other machines may have other paths and devices; they share all that
            # decides an accuracy.
            if name not in (*OF_THE_MACHINE, *NOT_HERE)
        }
        self.settings: dict[str, Any] = {"training": training}
        rng = np.random.default_rng(0)
        # Every cell has the same settings, so any cell finds out whether they can be trained.
        some_cell = OperationDistribution.dirichlet(layout, rng).sample(layout, rng)
        Trainer(self.config, some_cell, self.images)  # its errors are to be seen before a study

    @classmethod
    def of_file(cls, path: Path | str, layout: SlotLayout) -> TrainingEvaluator:
        """Makes it by a file of settings of `fastnas train`.

        Raises:
            ConfigError: it is none, or sets what an evaluation does not have.
        """
        settings = read_settings(file_path(path))
        for name in NOT_HERE:
            if name in settings:
                raise ConfigError(f"config file {path}: {name} has no meaning for evaluations")
        try:
            return cls(make_config(TrainConfig, settings), layout)
        except ConfigError as error:
            raise ConfigError(f"config file {path}: {error}") from error

    def evaluate(self, cells: Sequence[AnyGenotype], seeds: Sequence[int]) -> list[Evaluation]:
        """Trains one cell after the other."""
        return [self._trained(cell, seed) for cell, seed in zip(cells, seeds, strict=True)]

    def _trained(self, cell: AnyGenotype, seed: int) -> Evaluation:
        start = perf_counter()
        # Two trainings of one cell differ in all that is random, but see the same images.
        config = replace(self.config, seed=seed)
        try:
            trainer = Trainer(config, cell, self.images)
        except ConfigError as error:
            raise EvaluationError(str(error)) from error
        accuracy = trainer.train(None, plain_console(quiet=True))
        return Evaluation(accuracy, perf_counter() - start, trainer.epochs)

    def reported(self, cell: AnyGenotype) -> None:
        return None


class TrainingOptions(EvaluatorOptions):
    """Opens trainings by a file of settings."""

    name = "train"
    place = "FILE of settings of train"

    length: int | None = option(None, "operations of a cell (as the space has them)", LENGTH)
    space: str = option("S0", "space of the cells")

    def open(self, place: str) -> TrainingEvaluator:
        try:
            layout = slots_of(get_space(self.space), self.length)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return TrainingEvaluator.of_file(place, layout)
