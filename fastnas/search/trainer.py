"""Trains a genotype from scratch, as DARTS and NAS-Bench-201 evaluate their cells, or a column."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from fastnas.data.batches import Batches
from fastnas.data.source import ImageSource
from fastnas.nn import EvalNetwork, count_parameters
from fastnas.search.build import (
    Answers,
    Pipeline,
    accuracy,
    augmentation,
    check_batch_norms,
    check_batch_size,
    chosen_images,
    cosine,
    load_data,
    run_precision,
    seeded,
)
from fastnas.search.config import ConfigError, TrainConfig
from fastnas.search.logs import Logs
from fastnas.search.progress import StepBar, memory_text
from fastnas.search.resumable import ResumableRun
from fastnas.search.trained import trained
from fastnas.spaces.mobile_genotype import Architecture

CHECKPOINT = "train.pt"
TEST_BATCH = 256


class Trainer(ResumableRun):
    """Trains one genotype's evaluation network.

    Args:
        images: what it trains and tests on, None: the config's data.
        names: setting to what the user calls it, where that is another name.

    Raises:
        ConfigError, DataError: the config cannot be run on this machine; a training that was built
            has nothing left to refuse.
    """

    kind = "training"
    checkpoint = CHECKPOINT
    summed = ("train_loss", "train_accuracy")
    config: TrainConfig

    def __init__(
        self,
        config: TrainConfig,
        genotype: Architecture,
        images: ImageSource | None = None,
        names: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        config.validate()
        self.names = names
        self.what = trained(genotype)
        is_default = config.batch_size is None
        usual_cutout = config.cutout is None
        config = config.completed(genotype)
        self.device = seeded(config)
        self.precision = run_precision(config, self.device)
        self.images = load_data(config, self.device) if images is None else images
        try:
            if usual_cutout:  # 16 pixels are published for 32, half of the side
                half = min(self.images.size) // 2
                config = replace(config, cutout=min(config.resolved("cutout"), half))
            # They are chosen first, because the default size of a batch depends on how many there
            # are.
            chosen = chosen_images(self.images, config.images, config.seed)
            if is_default:  # as the public code, which takes what there is
                size = min(config.resolved("batch_size"), len(chosen))
                size -= size % self.processes.size
                config = replace(config, batch_size=size)
            self.config = config
            self.network = self._build().to(self.device)
            self._check_batches(len(chosen))
            size, share = config.resolved("batch_size"), self.processes.share
            self.batches = Batches(chosen, size, config.seed, share=share)
            self.stream = self.images.stream(self.batches)
            augment = augmentation(config, self.images, config.resolved("cutout"))
        except (ValueError, TypeError) as error:
            raise ConfigError(str(error)) from error
        # The batches have the seed itself: two generators with one seed would draw the same
        # numbers.
        generator = torch.Generator().manual_seed(config.seed + 1)
        self.pipeline = Pipeline(self.images, augment, generator, share=self.processes.share)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=config.resolved("lr"),
            momentum=config.momentum,
            nesterov=config.resolved("nesterov"),
            weight_decay=config.resolved("weight_decay"),
        )

    def _check_batches(self, images: int) -> None:
        size, name = self.config.resolved("batch_size"), self.names.get("batch_size", "batch_size")
        check_batch_size(name, size, images, "to train on", self.processes.share)
        size //= self.processes.size
        if size == 1 and self.config.resolved("auxiliary"):
            raise ConfigError(
                f"{name} is 1; at least 2, or no auxiliary classifier, is needed: its batch norms"
                " see a single value per channel of an image"
            )
        check_batch_norms(name, size, self.images.shape, lambda images: self._build()(images))

    def _build(self) -> nn.Module:
        return self.what.network(self.config, self.images.classes, self.images.channels)

    @property
    def genotype(self) -> Architecture:
        """Returns what is trained, in the sizes that the config gives it."""
        return self.what.sized(self.config)

    @property
    def steps_per_epoch(self) -> int:
        return self.batches.batches_per_epoch

    @property
    def parameters(self) -> int:
        """Counts the parameters without the auxiliary head, as papers do."""
        return count_parameters(self.network)

    def train(self, out: Path | None, console: Console) -> float:
        """Trains on to the last epoch; returns the test accuracy after it.

        Args:
            out: where checkpoints and logs are left, made if need be; None: nothing is.
        """
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        logs_here = self.config.tensorboard and self.processes.is_first
        logs = Logs(out and out / "tensorboard-train", logs_here, self.epoch)
        total = self.epochs * self.steps_per_epoch
        done = self.epoch * self.steps_per_epoch + self.step
        with StepBar(console, "train", total, done) as bar:
            self.run(out and out / CHECKPOINT, logs, bar)
        logs.close()
        return float(self.history[-1]["test_accuracy"])

    def identity(self) -> dict[str, Any]:
        """Adds the genotype itself: the file that a config names may hold another by now."""
        return {**super().identity(), "genotype": self.what.json, **self.what.options(self.config)}

    def checkpointed(self) -> dict[str, Any]:
        parts = {"network": self.network, "optimizer": self.optimizer, "batches": self.batches}
        return {**parts, **self.precision.parts()}

    def close(self) -> None:
        self.stream.close()

    def generators(self) -> dict[str, torch.Generator]:
        return {"augment": self.pipeline.generator}

    def start_epoch(self) -> None:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = cosine(self.epoch, self.epochs, config.resolved("lr"), 0.0)
        if isinstance(self.network, EvalNetwork):
            # It rises linearly from 0, as in the public DARTS code.
            self.network.drop_path = config.resolved("drop_path") * self.epoch / self.epochs
        self.network.train()

    def run_step(self) -> None:
        images, labels = self.pipeline(self.stream)
        self.optimizer.zero_grad(set_to_none=True)
        params, half = list(self.network.parameters()), self.precision.weights
        with half.autocast():
            logits, auxiliary = self._logits(images)
            # The figure is without the auxiliary loss, so that it can be compared with other
            # networks'.
            loss = own = F.cross_entropy(logits, labels)
            if auxiliary is not None:
                weight = self.config.resolved("auxiliary_weight")
                loss = loss + weight * F.cross_entropy(auxiliary, labels)
        half.backward(loss)
        if half.scaling is not None:
            # In fp16 a step is skipped where its whole loss is not finite, its figures with it.
            own = torch.where(loss.detach().isfinite(), own.detach(), loss.detach())
        half.finish(params, self.config.grad_clip)
        half.move(params, loss, self.optimizer.step)
        self.processes.join_statistics(self.network.buffers())
        self.add(train_loss=own, train_accuracy=accuracy(logits, labels))

    def _logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the network's logits, and those of its auxiliary classifier where it has one."""
        found = self.network(images)
        return (found, None) if isinstance(found, Tensor) else found

    def end_epoch(self) -> dict[str, Any]:
        every = self.config.test_every
        last = self.epoch + 1 == self.epochs
        if last or (every and (self.epoch + 1) % every == 0):
            return {"test_accuracy": self.test()}
        return {}

    @torch.no_grad()
    def test(self) -> float:
        """Returns the accuracy on the held-back test images.

        Raises:
            DivergedError: a logit is not finite.
        """
        self.network.eval()
        images = self.images
        answers = Answers(self.device)
        with self.precision.autocast():
            for batch, labels in images.tests(TEST_BATCH, self.processes.share):
                logits, _ = self._logits(images.normalise(batch))
                answers.add(logits, labels)
        answers.join(self.processes)
        self.network.train()
        if not answers.finite:
            raise self.diverged("a logit of the test is not finite", self.step - 1)
        return int(answers.right) / len(images.test_labels)

    def progress(self, means: Mapping[str, float], seconds: float) -> str:
        return (
            f"loss {means['train_loss']:.3f}  acc {means['train_accuracy']:.3f}"
            f"  {self.batches.batch_size / seconds:.0f} img/s  {memory_text(self.device)}"
        )

    def advice(self) -> str:
        name = self.names.get("lr", "lr")
        return f"a lower {name} than {self.config.resolved('lr')} may help"

    def epoch_line(self) -> str:
        figures = self.history[-1]
        tested = figures.get("test_accuracy")
        return (
            f"epoch {self.epoch:3d}/{self.epochs}  loss {figures['train_loss']:.3f}"
            f"  train {figures['train_accuracy']:.3f}"
            + (f"  test {tested:.3f}" if tested is not None else "")
        )
