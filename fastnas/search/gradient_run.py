"""Holds what searches by gradient have alike: halves of the data, validation, how they are run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim import SGD, Adam

from fastnas.backends import AUTO, use_backend
from fastnas.data.batches import Batches, split_indices
from fastnas.data.source import ImageSource
from fastnas.nn import Paths
from fastnas.processes import Share
from fastnas.search.build import (
    Answers,
    Pipeline,
    augmentation,
    check_batch_norms,
    check_batch_size,
    chosen_images,
    load_data,
    run_backend,
    run_precision,
    seeded,
    some_of,
)
from fastnas.search.choice_cost import ChoiceCost
from fastnas.search.config import ConfigError, GradientConfig
from fastnas.search.logs import Logs
from fastnas.search.optimizers import adam, sgd
from fastnas.search.progress import StepBar, memory_text
from fastnas.search.recalibrate import recalibrated
from fastnas.search.resumable import ResumableRun
from fastnas.strategies.cost import CostTerm

CHECKPOINT = "search.pt"


class GradientRun(ResumableRun):
    """Searches by gradient, from a config to an architecture; subclasses say what is searched.

    Args:
        images: what it searches on, None: the config's data.

    Raises:
        ConfigError, DataError, BackendError: the config cannot be run on this machine.
    """

    kind = "search"
    checkpoint = CHECKPOINT
    summed = ("train_loss", "train_accuracy", "valid_loss")
    skips: ClassVar[str]
    """The figure of an epoch that counts skips, which the bar shows."""
    config: GradientConfig
    network: nn.Module
    cost: CostTerm | ChoiceCost | None
    """What the loss of the logits has besides, for what the derived network costs."""

    def __init__(self, config: GradientConfig, images: ImageSource | None = None) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.strategy = config.strategy()
        # Networks and logits draw their first values from the global generators: these are seeded
        # before anything is built.
        self.device = seeded(config)
        self.precision = run_precision(config, self.device)
        with self.on_backend():
            # A backend that is missing is refused here, before minutes may go into reading the
            # data.
            self.backend = run_backend(self.device, self.precision)
        self.images = load_data(config, self.device) if images is None else images
        self.begin()
        self._build_batches(self.images)

    def begin(self) -> None:
        """Builds what is searched, and its optimizers."""
        raise NotImplementedError

    def validation_weights(self) -> Any:
        """Returns what the network is validated on, its second argument: weights or `Paths`."""
        raise NotImplementedError

    def mixture(self, images: Tensor) -> Tensor:
        """Runs all candidates in eager torch, among them whatever a sampled path may run."""
        raise NotImplementedError

    @property
    def channels_last(self) -> bool:
        """Tells whether images are laid out channels last."""
        return False

    @property
    def steps_per_epoch(self) -> int:
        return self.train_batches.batches_per_epoch

    def search(self, out: Path, console: Console) -> None:
        """Searches on to the last epoch, leaving checkpoints and logs in `out`, made if need be."""
        out.mkdir(parents=True, exist_ok=True)
        logs_here = self.config.tensorboard and self.processes.is_first
        logs = Logs(out / "tensorboard", logs_here, self.epoch)
        total = self.epochs * self.steps_per_epoch
        done = self.epoch * self.steps_per_epoch + self.step
        with self.on_backend(), StepBar(console, "search", total, done) as bar:
            self.run(out / CHECKPOINT, logs, bar)
        logs.close()

    def close(self) -> None:
        self.train_stream.close()
        self.valid_stream.close()

    def generators(self) -> dict[str, torch.Generator]:
        return {"augment": self.pipeline.generator}

    def optimizers(
        self, weights: Iterable[nn.Parameter], logits: Iterable[nn.Parameter], capturable: bool
    ) -> tuple[SGD, Adam]:
        """Makes those of the weights and of the logits by the settings of the run."""
        config = self.config
        of_weights = sgd(
            weights,
            lr=config.resolved("lr"),
            capturable=capturable,
            momentum=config.momentum,
            weight_decay=config.resolved("weight_decay"),
        )
        of_logits = adam(
            logits,
            lr=config.resolved("arch_lr"),
            capturable=capturable,
            betas=self.strategy.alpha_betas,
            weight_decay=config.arch_weight_decay,
        )
        return of_weights, of_logits

    def judged(self, searched: bool) -> dict[str, Any]:
        """Returns what the end of an epoch adds of validations.

        Args:
            searched: whether the logits have moved in it.
        """
        # The sum is 0 where no logit has moved yet, which would read as a perfect loss.
        figures: dict[str, Any] = {} if searched else {"valid_loss": None}
        every, done = self.config.validate_every, self.epoch + 1
        if done == self.epochs or (every and done % every == 0):
            figures["valid_accuracy"] = self.validate()
        return figures

    @torch.no_grad()
    def validate(self) -> float:
        """Returns the accuracy on the images of the logits, in eval mode.

        It is that of the supernet, or of its likeliest path where the method samples paths.

        Raises:
            DivergedError: one of the network's logits is not finite.
        """
        weights, network = self.validation_weights(), self.network
        labels = self.pipeline.images.train_labels
        answers = Answers(self.device)
        mine = self.processes.share.spread(self.valid_index)
        with self.precision.autocast():
            if any(isinstance(w, Paths) for w in _listed(weights)):
                batches = (batch for _, batch in self.plain(self.recalibration_index))
                # It returns a copy: the search goes on with the statistics of all the paths it
                # samples.
                network = recalibrated(network, weights, batches)
            network.eval()
            for index, batch in self.plain(mine):
                answers.add(network(batch, weights), labels[index])
        answers.join(self.processes)
        self.network.train()
        if not answers.finite:
            raise self.diverged("a logit of the validation is not finite", self.step - 1)
        return int(answers.right) / len(self.valid_index)

    @property
    def _plain_size(self) -> int:
        return 4 * self.config.resolved("batch_size")

    def plain(self, chosen: Tensor, size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields indices and images, not augmented, `size` at a time; None: in large batches."""
        images = self.pipeline.images
        for index, pixels in images.plain(chosen, size or self._plain_size):
            yield index, self.pipeline.laid_out(images.normalise(pixels))

    def progress(self, means: Mapping[str, float], seconds: float) -> str:
        skips = self.history[-1][self.skips] if self.history else 0
        return (
            f"loss {means['train_loss']:.3f}  acc {means['train_accuracy']:.3f}  skips {skips}"
            # A step takes two batches, one for the weights and one for the logits.
            f"  {2 * self.train_batches.batch_size / seconds:.0f} img/s  {memory_text(self.device)}"
        )

    def advice(self) -> str:
        lr, arch_lr = self.config.resolved("lr"), self.config.resolved("arch_lr")
        return f"a lower lr than {lr} or arch_lr than {arch_lr} may help"

    def epoch_line(self) -> str:
        figures = self.history[-1]
        valid = figures.get("valid_accuracy")
        warning = "  collapsing to skip connections" if figures["collapsed"] else ""
        return (
            f"epoch {self.epoch:3d}/{self.epochs}  loss {figures['train_loss']:.3f}"
            f"  train {figures['train_accuracy']:.3f}"
            + (f"  valid {valid:.3f}" if valid is not None else "")
            + f"  {self.decisions(figures)}{warning}"
        )

    def decisions(self, figures: Mapping[str, Any]) -> str:
        """Returns what the line of an epoch says of the logits: skips and entropy."""
        raise NotImplementedError

    def on_backend(self) -> Any:
        """Returns the context of the run's backend."""
        return use_backend(self.config.backend) if self.config.backend != AUTO else nullcontext()

    def _build_batches(self, images: ImageSource) -> None:
        config = self.config
        try:
            chosen = chosen_images(images, config.images, config.seed)
            labels = images.train_labels.cpu()[chosen]
            train, valid = split_indices(labels, config.train_fraction, config.seed)
            self.valid_index = chosen[valid].to(self.device)
            batch_size = config.resolved("batch_size")
            share = self.share_of_batches()
            check_batch_size("batch_size", batch_size, len(train), "for the weights", share)
            check_batch_size("batch_size", batch_size, len(valid), "for the logits", share)
            part = batch_size // share.size
            check_batch_norms("batch_size", part, images.shape, self.mixture)
            # The halves have seeds of their own: with one seed both would be shuffled alike, and
            # the same images would meet in every epoch.
            sizes = {"batch_size": batch_size, "share": share}
            self.train_batches = Batches(chosen[train], seed=config.seed, **sizes)
            self.valid_batches = Batches(chosen[valid], seed=config.seed + 1, **sizes)
            self.train_stream = images.stream(self.train_batches)
            self.valid_stream = images.stream(self.valid_batches)
            whole = self._plain_size, config.seed
            self.recalibration_index = some_of(chosen[train], *whole).to(self.device)
            self.evaluation_index = some_of(chosen[valid], *whole).to(self.device)
            augment = augmentation(config, images, config.cutout)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{config.data}: {error}") from error
        generator = torch.Generator().manual_seed(config.seed + 2)
        self.pipeline = Pipeline(images, augment, generator, self.channels_last, share)

    def share_of_batches(self) -> Share:
        """Returns the part of each batch that this process runs.

        Raises:
            ValueError: the processes cannot share the run as it asks for.
        """
        return self.processes.share


def _listed(weights: Any) -> list[Any]:
    """Returns the weights or paths of all cell types, or of all layers."""
    return list(weights.values() if isinstance(weights, Mapping) else weights or ())
