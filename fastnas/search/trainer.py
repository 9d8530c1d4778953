"""Training a genotype from scratch, as DARTS evaluates its cells."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console

from fastnas.nn import EvalNetwork, count_parameters
from fastnas.search.batches import Batches, split_indices
from fastnas.search.checkpoint import (
    CheckpointError,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from fastnas.search.config import ConfigError, TrainConfig
from fastnas.search.logs import Logs
from fastnas.search.progress import StepBar, memory_text
from fastnas.search.setting import (
    Pipeline,
    accuracy,
    augmentation,
    cosine,
    load_data,
    seeded,
)
from fastnas.spaces import Genotype

CHECKPOINT = "train.pt"
KIND = "training"


class Trainer:
    """The training of one genotype's evaluation network, resumable at any checkpoint.

    Raises:
        ConfigError, DataError: the config cannot be run on this machine.
    """

    def __init__(self, config: TrainConfig, genotype: Genotype) -> None:
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
            labels = self.images.train_labels.cpu()
            chosen = torch.arange(len(labels))
            if config.images is not None and config.images < len(labels):
                chosen, _ = split_indices(labels, config.images / len(labels), config.seed)
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
        self.epoch = 0
        self.step = 0
        self.seconds = 0.0
        self.sums = dict.fromkeys(("train_loss", "train_accuracy"), 0.0)
        self.history: list[dict[str, Any]] = []

    @property
    def finished(self) -> bool:
        return self.epoch == self.config.epochs

    @property
    def parameters(self) -> int:
        """Without the auxiliary head, as papers count them."""
        return count_parameters(self.network)

    def run(self, out: Path, console: Console) -> float:
        """Trains on to the last epoch; returns the test accuracy after it."""
        logs = Logs(out / "tensorboard-train", self.config.tensorboard, self.epoch)
        steps = self.batches.batches_per_epoch
        done = self.epoch * steps + self.step
        with StepBar(console, "train", self.config.epochs * steps, done) as bar:
            while not self.finished:
                self._run_epoch(out, bar)
                logs.epoch(self.history[-1])
                tested = self.history[-1].get("test_accuracy")
                bar.line(
                    f"epoch {self.epoch:3d}/{self.config.epochs}"
                    f"  loss {self.history[-1]['train_loss']:.3f}"
                    f"  train {self.history[-1]['train_accuracy']:.3f}"
                    + (f"  test {tested:.3f}" if tested is not None else "")
                )
                save_checkpoint(out / CHECKPOINT, KIND, self.state())
        logs.close()
        return float(self.history[-1]["test_accuracy"])

    def state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "sums": dict(self.sums),
            "history": list(self.history),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "augment": self.pipeline.generator.get_state(),
            "random": random_state(),
        }

    def resume(self, path: Path) -> None:
        state = load_checkpoint(path, KIND)
        try:
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.batches.load_state_dict(state["batches"])
            self.pipeline.generator.set_state(state["augment"])
            self.epoch, self.step = state["epoch"], state["step"]
            self.seconds, self.sums = state["seconds"], dict(state["sums"])
            self.history = list(state["history"])
            restore_random_state(state["random"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            text = " ".join(str(error).split())
            raise CheckpointError(f"checkpoint {path} does not fit this network: {text}") from error

    def _run_epoch(self, out: Path, bar: StepBar) -> None:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = cosine(self.epoch, config.epochs, config.lr, 0.0)
        self.network.drop_path = config.drop_path * self.epoch / config.epochs
        self.network.train()
        while self.step < self.batches.batches_per_epoch:
            started = time.perf_counter()
            self._run_step()
            seconds = time.perf_counter() - started
            self.seconds += seconds
            bar.advance(
                f"loss {self.sums['train_loss'] / self.step:.3f}"
                f"  acc {self.sums['train_accuracy'] / self.step:.3f}"
                f"  {config.batch_size / seconds:.0f} img/s  {memory_text(self.device)}"
            )
            if config.checkpoint_every and self.step % config.checkpoint_every == 0:
                save_checkpoint(out / CHECKPOINT, KIND, self.state())
        steps = self.batches.batches_per_epoch
        figures: dict[str, Any] = {
            "epoch": self.epoch,
            **{name: total / steps for name, total in self.sums.items()},
        }
        last = self.epoch + 1 == config.epochs
        if last or (config.test_every and (self.epoch + 1) % config.test_every == 0):
            figures["test_accuracy"] = self.test()
        self.history.append(figures)
        self.sums = dict.fromkeys(self.sums, 0.0)
        self.epoch += 1
        self.step = 0

    def _run_step(self) -> None:
        images, labels = self.pipeline(self.batches.next())
        self.optimizer.zero_grad(set_to_none=True)
        logits, auxiliary = self.network(images)
        loss = F.cross_entropy(logits, labels)
        self.sums["train_loss"] += float(loss.detach())
        if auxiliary is not None:
            loss = loss + self.config.auxiliary_weight * F.cross_entropy(auxiliary, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.sums["train_accuracy"] += accuracy(logits, labels)
        self.step += 1

    @torch.no_grad()
    def test(self) -> float:
        """Accuracy on the held-back test images."""
        self.network.eval()
        correct = 0
        for images, labels in zip(self.images.test.split(256), self.images.test_labels.split(256)):
            logits, _ = self.network(self.images.normalise(images))
            correct += int((logits.argmax(1) == labels).sum())
        self.network.train()
        return correct / len(self.images.test)
