"""Training a genotype from scratch, as DARTS evaluates its cells."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console

from fastnas.nn import EvalNetwork, count_parameters
from fastnas.search.batches import Batches
from fastnas.search.config import ConfigError, TrainConfig
from fastnas.search.logs import Logs
from fastnas.search.progress import StepBar, memory_text
from fastnas.search.resumable import ResumableRun
from fastnas.search.setting import (
    Pipeline,
    accuracy,
    augmentation,
    chosen_images,
    cosine,
    load_data,
    seeded,
)
from fastnas.spaces import Genotype

CHECKPOINT = "train.pt"
TEST_BATCH = 256


class Trainer(ResumableRun):
    """The training of one genotype's evaluation network.

    Raises:
        ConfigError, DataError: the config cannot be run on this machine.
    """

    kind = "training"
    summed = ("train_loss", "train_accuracy")
    config: TrainConfig

    def __init__(self, config: TrainConfig, genotype: Genotype) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.device = seeded(config)
        self.images = load_data(config, self.device)
        try:
            self.network = EvalNetwork(
                genotype,
                config.channels,
                self.images.classes,
                config.layers,
                in_channels=self.images.channels,
                auxiliary=config.auxiliary,
            ).to(self.device)
            chosen = chosen_images(self.images, config.images, config.seed)
            self.batches = Batches(chosen, config.batch_size, config.seed)
            augment = augmentation(config, self.images, config.cutout)
        except (ValueError, TypeError) as error:
            raise ConfigError(str(error)) from error
        generator = torch.Generator().manual_seed(config.seed + 1)
        self.pipeline = Pipeline(self.images, augment, generator)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )

    @property
    def steps_per_epoch(self) -> int:
        return self.batches.batches_per_epoch

    @property
    def parameters(self) -> int:
        """Without the auxiliary head, as papers count them."""
        return count_parameters(self.network)

    def train(self, out: Path, console: Console) -> float:
        """Trains on to the last epoch; returns the test accuracy after it."""
        logs = Logs(out / "tensorboard-train", self.config.tensorboard, self.epoch)
        total = self.config.epochs * self.steps_per_epoch
        done = self.epoch * self.steps_per_epoch + self.step
        with StepBar(console, "train", total, done) as bar:
            self.run(out / CHECKPOINT, logs, bar)
        logs.close()
        return float(self.history[-1]["test_accuracy"])

    def parts(self) -> dict[str, Any]:
        return {"network": self.network, "optimizer": self.optimizer, "batches": self.batches}

    def generators(self) -> dict[str, torch.Generator]:
        return {"augment": self.pipeline.generator}

    def start_epoch(self) -> None:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = cosine(self.epoch, config.epochs, config.lr, 0.0)
        self.network.drop_path = config.drop_path * self.epoch / config.epochs
        self.network.train()

    def run_step(self) -> None:
        images, labels = self.pipeline(self.batches.next())
        self.optimizer.zero_grad(set_to_none=True)
        logits, auxiliary = self.network(images)
        loss = F.cross_entropy(logits, labels)
        self.add(train_loss=loss)
        if auxiliary is not None:
            loss = loss + self.config.auxiliary_weight * F.cross_entropy(auxiliary, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.add(train_accuracy=accuracy(logits, labels))

    def end_epoch(self) -> dict[str, Any]:
        every = self.config.test_every
        last = self.epoch + 1 == self.config.epochs
        if last or (every and (self.epoch + 1) % every == 0):
            return {"test_accuracy": self.test()}
        return {}

    @torch.no_grad()
    def test(self) -> float:
        """Accuracy on the held-back test images."""
        self.network.eval()
        images = self.images
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for batch, labels in zip(
            images.test.split(TEST_BATCH), images.test_labels.split(TEST_BATCH)
        ):
            logits, _ = self.network(images.normalise(batch))
            correct += (logits.argmax(1) == labels).sum()
        self.network.train()
        return int(correct) / len(images.test)

    def progress(self, means: Mapping[str, float], seconds: float) -> str:
        return (
            f"loss {means['train_loss']:.3f}  acc {means['train_accuracy']:.3f}"
            f"  {self.config.batch_size / seconds:.0f} img/s  {memory_text(self.device)}"
        )

    def epoch_line(self) -> str:
        figures = self.history[-1]
        tested = figures.get("test_accuracy")
        return (
            f"epoch {self.epoch:3d}/{self.config.epochs}  loss {figures['train_loss']:.3f}"
            f"  train {figures['train_accuracy']:.3f}"
            + (f"  test {tested:.3f}" if tested is not None else "")
        )
