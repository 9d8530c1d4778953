"""The search loop: epochs, batches, two optimizers, a strategy, a monitor, a checkpoint."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastnas.backends import AUTO, Request, choose, use_backend
from fastnas.nn import ArchParameters, SearchNetwork
from fastnas.ops import OPS
from fastnas.search.batches import Batches, split_indices
from fastnas.search.bilevel import Bilevel
from fastnas.search.checkpoint import (
    CheckpointError,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from fastnas.search.config import ConfigError, SearchConfig
from fastnas.search.logs import Logs
from fastnas.search.monitor import has_collapsed, observe
from fastnas.search.progress import StepBar, memory_text
from fastnas.search.setting import (
    Pipeline,
    accuracy,
    augmentation,
    cosine,
    in_channels_last,
    load_data,
    seeded,
)
from fastnas.spaces import Genotype, get_space, to_darts, to_json

CHECKPOINT = "search.pt"
KIND = "search"


class Searcher:
    """A search, from its config to a genotype.

    Raises:
        ConfigError, DataError, BackendError: the config cannot be run on this machine.
    """

    def __init__(self, config: SearchConfig) -> None:
        config.validate()
        self.config = config
        self.strategy = config.strategy()
        self.device = seeded(config)
        with self._backend():
            request = Request(OPS["mixed_sum"], self.device.type, torch.float32)
            self.backend = choose(request)
        images = load_data(config, self.device)
        self.space = self.strategy.space(get_space(config.space))
        self.network = SearchNetwork(
            self.space,
            config.channels,
            images.classes,
            config.layers,
            in_channels=images.channels,
            noise=self.strategy.skip_noise(),
            skip_drop_path=self.strategy.skip_drop_probability(),
        ).to(self.device)
        if config.channels_last:
            in_channels_last(self.network)
        self.arch = ArchParameters(self.space, self.strategy.alpha_scale).to(self.device)
        self._build_optimizers()
        self._build_batches(images)
        self.epoch = 0
        self.step = 0
        self.seconds = 0.0
        self.sums = dict.fromkeys(("train_loss", "train_accuracy", "valid_loss"), 0.0)
        self.history: list[dict[str, Any]] = []

    @property
    def steps_per_epoch(self) -> int:
        return self.train_batches.batches_per_epoch

    @property
    def finished(self) -> bool:
        return self.epoch == self.config.epochs

    def genotype(self) -> Genotype:
        return self.strategy.derive(self.arch, self.space)

    def run(self, out: Path, console: Console) -> None:
        """Searches on to the last epoch, leaving checkpoints and logs in `out`."""
        logs = Logs(out / "tensorboard", self.config.tensorboard, self.epoch)
        total = self.config.epochs * self.steps_per_epoch
        done = self.epoch * self.steps_per_epoch + self.step
        with self._backend(), StepBar(console, "search", total, done) as bar:
            while not self.finished:
                self._run_epoch(out, bar)
                logs.epoch(self.history[-1])
                bar.line(epoch_line(self.history[-1], self.config.epochs))
                save_checkpoint(out / CHECKPOINT, KIND, self.state())
        logs.close()

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the search depends on."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "sums": dict(self.sums),
            "history": list(self.history),
            "network": self.network.state_dict(),
            "arch": self.arch.state_dict(),
            "params_optimizer": self.params_optimizer.state_dict(),
            "arch_optimizer": self.arch_optimizer.state_dict(),
            "train_batches": self.train_batches.state_dict(),
            "valid_batches": self.valid_batches.state_dict(),
            "augment": self.pipeline.generator.get_state(),
            "random": random_state(),
        }

    def resume(self, path: Path) -> None:
        """Goes back to the state that a checkpoint holds, bit for bit."""
        state = load_checkpoint(path, KIND)
        try:
            self.network.load_state_dict(state["network"])
            self.arch.load_state_dict(state["arch"])
            self.params_optimizer.load_state_dict(state["params_optimizer"])
            self.arch_optimizer.load_state_dict(state["arch_optimizer"])
            self.train_batches.load_state_dict(state["train_batches"])
            self.valid_batches.load_state_dict(state["valid_batches"])
            self.pipeline.generator.set_state(state["augment"])
            self.epoch, self.step = state["epoch"], state["step"]
            self.seconds, self.sums = state["seconds"], dict(state["sums"])
            self.history = list(state["history"])
            restore_random_state(state["random"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            text = " ".join(str(error).split())
            raise CheckpointError(f"checkpoint {path} does not fit this search: {text}") from error

    def _run_epoch(self, out: Path, bar: StepBar) -> None:
        config = self.config
        rate = cosine(self.epoch, config.epochs, config.resolved("lr"), config.lr_min)
        for group in self.params_optimizer.param_groups:
            group["lr"] = rate
        amplitude = self.strategy.noise_amplitude(self.epoch, config.epochs)
        self.network.set_noise_amplitude(amplitude)
        self.network.train()
        while self.step < self.steps_per_epoch:
            started = time.perf_counter()
            self._run_step()
            self.seconds += time.perf_counter() - started
            bar.advance(self._figures(time.perf_counter() - started))
            if config.checkpoint_every and self.step % config.checkpoint_every == 0:
                save_checkpoint(out / CHECKPOINT, KIND, self.state())
        self._close_epoch(rate, amplitude)

    def _run_step(self) -> None:
        train = self.pipeline(self.train_batches.next())
        if self.epoch >= self.config.arch_start_epoch:
            valid = self.pipeline(self.valid_batches.next())
            self.sums["valid_loss"] += float(self.bilevel.arch_step(valid, train))
        loss, logits = self.bilevel.weight_step(train)
        self.sums["train_loss"] += float(loss)
        self.sums["train_accuracy"] += accuracy(logits, train[1])
        self.step += 1

    def _close_epoch(self, rate: float, amplitude: float) -> None:
        config = self.config
        genotype = self.genotype()
        with torch.no_grad():
            weights = self.strategy.mixing_weights(self.arch)
        figures: dict[str, Any] = {
            "epoch": self.epoch,
            **{name: total / self.steps_per_epoch for name, total in self.sums.items()},
            **observe(weights, genotype),
            "lr": rate,
            "noise_amplitude": amplitude,
            "genotype": to_text(genotype),
        }
        if self.epoch < config.arch_start_epoch:
            del figures["valid_loss"]
        last = self.epoch + 1 == config.epochs
        if last or (config.validate_every and (self.epoch + 1) % config.validate_every == 0):
            figures["valid_accuracy"] = self.validate()
        skips = [*(past["skips_normal"] for past in self.history), figures["skips_normal"]]
        figures["collapsed"] = has_collapsed(skips, 2 * self.space.nodes)
        self.history.append(figures)
        self.sums = dict.fromkeys(self.sums, 0.0)
        self.epoch += 1
        self.step = 0

    @torch.no_grad()
    def validate(self) -> float:
        """Accuracy of the whole supernet, in eval mode, on the images of the logits."""
        self.network.eval()
        weights = self.strategy.mixing_weights(self.arch)
        images, correct = self.pipeline.images, 0
        for index in self.valid_index.split(4 * self.config.resolved("batch_size")):
            batch = self.pipeline.laid_out(images.normalise(images.train[index]))
            logits = self.network(batch, weights)
            correct += int((logits.argmax(1) == images.train_labels[index]).sum())
        self.network.train()
        return correct / len(self.valid_index)

    def _figures(self, seconds: float) -> str:
        n = self.step
        skips = self.history[-1]["skips_normal"] if self.history else 0
        return (
            f"loss {self.sums['train_loss'] / n:.3f}  acc {self.sums['train_accuracy'] / n:.3f}"
            f"  skips {skips}  {2 * self.config.resolved('batch_size') / seconds:.0f} img/s"
            f"  {memory_text(self.device)}"
        )

    def _backend(self) -> Any:
        return use_backend(self.config.backend) if self.config.backend != AUTO else nullcontext()

    def _build_optimizers(self) -> None:
        config = self.config
        self.params_optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=config.resolved("lr"),
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.arch_optimizer = torch.optim.Adam(
            self.arch.parameters(),
            lr=config.resolved("arch_lr"),
            betas=self.strategy.alpha_betas,
            weight_decay=config.arch_weight_decay,
        )
        self.bilevel = Bilevel(
            self.network,
            self.arch,
            self.strategy,
            self.params_optimizer,
            self.arch_optimizer,
            config.grad_clip,
        )

    def _build_batches(self, images: Any) -> None:
        config = self.config
        try:
            labels = images.train_labels.cpu()
            chosen = torch.arange(len(labels))
            if config.images is not None and config.images < len(labels):
                chosen, _ = split_indices(labels, config.images / len(labels), config.seed)
            train, valid = split_indices(labels[chosen], config.train_fraction, config.seed)
            self.valid_index = chosen[valid].to(self.device)
            batch_size = config.resolved("batch_size")
            self.train_batches = Batches(chosen[train], batch_size, config.seed)
            self.valid_batches = Batches(chosen[valid], batch_size, config.seed + 1)
            augment = augmentation(config, images, config.cutout)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{config.data}: {error}") from error
        generator = torch.Generator().manual_seed(config.seed + 2)
        self.pipeline = Pipeline(images, augment, generator, config.channels_last)


def to_text(genotype: Genotype) -> str:
    """DARTS text where it can express the genotype, else JSON."""
    try:
        return to_darts(genotype)
    except ValueError:
        return to_json(genotype)


def epoch_line(figures: dict[str, Any], epochs: int) -> str:
    valid = figures.get("valid_accuracy")
    warning = "  [yellow]collapsing to skip connections[/]" if figures["collapsed"] else ""
    return (
        f"epoch {figures['epoch'] + 1:3d}/{epochs}  loss {figures['train_loss']:.3f}"
        f"  train {figures['train_accuracy']:.3f}"
        + (f"  valid {valid:.3f}" if valid is not None else "")
        + f"  skips {figures['skips_normal']}|{figures['skips_reduce']}"
        f"  entropy {figures['entropy_normal']:.3f}|{figures['entropy_reduce']:.3f}{warning}"
    )
