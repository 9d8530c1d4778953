"""Runs a search: stages, epochs, batches, two optimizers, a strategy, a monitor."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from fastnas import reference
from fastnas.backends import AUTO, choose, use_backend
from fastnas.data.batches import Batches, split_indices
from fastnas.data.source import ImageSource
from fastnas.nn import SEARCH_NETWORKS, ArchParameters, Paths, SearchNetwork
from fastnas.ops import OPS
from fastnas.processes import WHOLE, Share
from fastnas.search.bilevel import Bilevel
from fastnas.search.build import (
    Answers,
    Pipeline,
    accuracy,
    augmentation,
    check_batch_norms,
    check_batch_size,
    chosen_images,
    cosine,
    in_channels_last,
    load_data,
    seeded,
)
from fastnas.search.config import ConfigError, SearchConfig
from fastnas.search.cuda_graph import CudaRecorder, GraphedBilevel, why_not_graphed
from fastnas.search.early_stop import EarlyStop
from fastnas.search.eigenvalue import EigenvalueMonitor
from fastnas.search.logs import Logs
from fastnas.search.monitor import has_collapsed, observe
from fastnas.search.optimizers import adam, capturable_on, set_learning_rate, sgd
from fastnas.search.progress import StepBar, memory_text
from fastnas.search.recalibrate import recalibrated
from fastnas.search.resumable import ResumableRun
from fastnas.spaces import AnyGenotype, Space, get_space, layout_of

Network = TypeVar("Network", bound=reference.SearchNetwork)

logger = logging.getLogger("fastnas")

CHECKPOINT = "search.pt"
EVALUATION_IMAGES = 4096
"""The most whose statistics a path is validated with, or that a cell is evaluated on."""


class Searcher(ResumableRun):
    """Searches, from a config to a genotype.

    Args:
        images: what it searches on, None: the config's data.

    Raises:
        ConfigError, DataError, BackendError: the config cannot be run on this machine.
    """

    kind = "search"
    checkpoint = CHECKPOINT
    summed = ("train_loss", "train_accuracy", "valid_loss")
    remembered: ClassVar = {"skips_normal": int, "genotype": str, "collapsed": bool}
    config: SearchConfig

    def __init__(self, config: SearchConfig, images: ImageSource | None = None) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.strategy = config.strategy()
        # Networks and logits draw their first values from the global generators: these are seeded
        # before anything is built.
        self.device = seeded(config)
        with self.on_backend():
            # A backend that is missing is refused here, before minutes may go into reading the
            # data.
            self.backend = choose(OPS["mixed_sum"], self.device, torch.float32)
        self.images = load_data(config, self.device) if images is None else images
        self.eigenvalue = EigenvalueMonitor(config)
        self.stages = self.strategy.stages(config.resolved("layers"), config.epochs)
        self._begin_stage(self.strategy.space(get_space(config.space)), [])
        self._build_batches(self.images)

    def build(self, kind: type[Network]) -> Network:
        """Builds a search network of the stage's sizes, of one of the kinds that run it."""
        config = self.config
        network = kind(
            self.space,
            config.channels,
            self.images.classes,
            self.stages[self.stage].layers,
            in_channels=self.images.channels,
            noise=self.strategy.skip_noise(),
            skip_drop_path=self.strategy.skip_drop_probability(),
        )
        if isinstance(network, SearchNetwork):
            network.set_memory(config.memory)
        return network

    @property
    def epochs(self) -> int:
        return sum(stage.epochs for stage in self.stages)

    @property
    def early_stop(self) -> EarlyStop | None:
        """Returns where the search has stopped early, by its history; None where it has not."""
        return self.eigenvalue.stop(self.history)

    @property
    def finished(self) -> bool:
        return super().finished or self.early_stop is not None

    @property
    def stage(self) -> int:
        """Returns the number of the stage under way, from 0."""
        return len(self.past_logits)

    @property
    def stage_epoch(self) -> int:
        """Returns how many epochs of the stage under way are done."""
        return self.epoch - sum(stage.epochs for stage in self.stages[: self.stage])

    @property
    def is_graphed(self) -> bool:
        """Tells whether the steps are replayed from CUDA graphs."""
        return isinstance(self.bilevel, GraphedBilevel) and self.bilevel.failure is None

    @property
    def steps_per_epoch(self) -> int:
        return self.train_batches.batches_per_epoch

    def genotype(self) -> AnyGenotype:
        return self.strategy.derive(self.arch, self.space)

    def search(self, out: Path, console: Console) -> None:
        """Searches on to the last epoch, leaving checkpoints and logs in `out`, made if need be."""
        if self.config.cuda_graph and self.not_graphed is not None:
            logger.warning("fastnas: the search runs without CUDA graphs: %s", self.not_graphed)
        out.mkdir(parents=True, exist_ok=True)
        logs_here = self.config.tensorboard and self.processes.is_first
        logs = Logs(out / "tensorboard", logs_here, self.epoch)
        total = self.epochs * self.steps_per_epoch
        done = self.epoch * self.steps_per_epoch + self.step
        with self.on_backend(), StepBar(console, "search", total, done) as bar:
            self.run(out / CHECKPOINT, logs, bar)
        logs.close()

    def checkpointed(self) -> dict[str, Any]:
        return {
            "network": self.network,
            "arch": self.arch,
            "params_optimizer": self.params_optimizer,
            "arch_optimizer": self.arch_optimizer,
            "train_batches": self.train_batches,
            "valid_batches": self.valid_batches,
        }

    def close(self) -> None:
        self.train_stream.close()
        self.valid_stream.close()

    def generators(self) -> dict[str, torch.Generator]:
        return {"augment": self.pipeline.generator}

    def start_epoch(self) -> None:
        epoch, epochs = self.stage_epoch, self.stages[self.stage].epochs
        set_learning_rate(self.params_optimizer, self._learning_rate())
        self.strategy.start_epoch(epoch, epochs)
        self.network.set_noise_amplitude(self.strategy.noise_amplitude(epoch, epochs))
        self.network.train()

    def run_step(self) -> None:
        train = self.pipeline(self.train_stream)
        if self.stage_epoch >= self.config.arch_start_epoch:
            # The batch of the weights is made first: both take their augmentation from one
            # generator, so the order belongs to the bits of the run.
            valid = self.pipeline(self.valid_stream)
            self.add(valid_loss=self.bilevel.arch_step(valid, train))
        loss, logits = self.bilevel.weight_step(train)
        self.add(train_loss=loss, train_accuracy=accuracy(logits, train[1]))

    def end_epoch(self) -> dict[str, Any]:
        config, genotype = self.config, self.genotype()
        with torch.no_grad():
            weights = self.strategy.mixing_weights(self.arch)
        figures: dict[str, Any] = observe(weights, genotype) | self.strategy.figures()
        skips = [*(past["skips_normal"] for past in self.history), figures["skips_normal"]]
        figures["collapsed"] = has_collapsed(skips, self.space.kept_edges)
        figures["lr"] = self._learning_rate()
        epoch, epochs = self.stage_epoch, self.stages[self.stage].epochs
        figures["noise_amplitude"] = self.strategy.noise_amplitude(epoch, epochs)
        figures["genotype"] = layout_of(genotype).text(genotype)
        if epoch < config.arch_start_epoch:
            # The sum is 0 where no logit has moved yet, which would read as a perfect loss.
            figures["valid_loss"] = None
        figures |= self.eigenvalue.measured(self)
        last = self.epoch + 1 == self.epochs
        if last or (config.validate_every and (self.epoch + 1) % config.validate_every == 0):
            figures["valid_accuracy"] = self.validate()
        return figures

    @torch.no_grad()
    def validate(self) -> float:
        """Returns the accuracy on the images of the logits, in eval mode.

        It is that of the supernet, or of its likeliest path where the method samples paths.

        Raises:
            DivergedError: one of the network's logits is not finite.
        """
        weights, network = self.strategy.validation_weights(self.arch), self.network
        if any(isinstance(w, Paths) for w in weights.values()):
            batches = (batch for _, batch in self.plain(self.recalibration_index))
            # It returns a copy: the search goes on with the statistics of all the paths it samples.
            network = recalibrated(network, weights, batches)
        network.eval()
        labels = self.pipeline.images.train_labels
        answers = Answers(self.device)
        for index, batch in self.plain(self.processes.share.spread(self.valid_index)):
            answers.add(network(batch, weights), labels[index])
        answers.join(self.processes)
        self.network.train()
        if not answers.finite:
            raise self.diverged("a logit of the validation is not finite", self.step - 1)
        return int(answers.right) / len(self.valid_index)

    def _subset(self, index: Tensor) -> Tensor:
        """Draws at most EVALUATION_IMAGES, in whole batches, so that all images weigh the same."""
        some = min(EVALUATION_IMAGES, len(index))
        some -= some % self._plain_size if some >= self._plain_size else 0
        generator = torch.Generator().manual_seed(self.config.seed)
        return index[torch.randperm(len(index), generator=generator)[:some]]

    @property
    def _plain_size(self) -> int:
        return 4 * self.config.resolved("batch_size")

    def plain(self, chosen: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields indices and images, not augmented, in large batches."""
        images = self.pipeline.images
        for index, pixels in images.plain(chosen, self._plain_size):
            yield index, self.pipeline.laid_out(images.normalise(pixels))

    def progress(self, means: Mapping[str, float], seconds: float) -> str:
        skips = self.history[-1]["skips_normal"] if self.history else 0
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
        cells = self.space.cell_types
        skips = [str(figures[f"skips_{cell}"]) for cell in cells]
        entropies = [f"{figures[f'entropy_{cell}']:.3f}" for cell in cells]
        warning = "  collapsing to skip connections" if figures["collapsed"] else ""
        if "eigenvalue" in figures:
            warning = f"  eigenvalue {figures['eigenvalue']:.3f}{warning}"
        if self.early_stop is not None:
            warning += f"\n{self.early_stop.text(self.epochs)}"
        return (
            f"epoch {self.epoch:3d}/{self.epochs}  loss {figures['train_loss']:.3f}"
            f"  train {figures['train_accuracy']:.3f}"
            + (f"  valid {valid:.3f}" if valid is not None else "")
            + f"  skips {'|'.join(skips)}  entropy {'|'.join(entropies)}{warning}"
        )

    def on_backend(self) -> Any:
        """Returns the context of the run's backend."""
        return use_backend(self.config.backend) if self.config.backend != AUTO else nullcontext()

    def after_epoch(self) -> None:
        """Begins the next stage where one has ended, or goes back where the search stops early."""
        if self.early_stop is not None:
            self.arch.load_state_dict(self.eigenvalue.logits_of(self.early_stop.rollback))
        if self.stage_epoch == self.stages[self.stage].epochs and not self.finished:
            space = self.strategy.next_space(self.space, self.arch)
            self._begin_stage(space, [*self.past_logits, self.arch.state_dict()])

    def extra_state(self) -> dict[str, Any]:
        return {"past_logits": self.past_logits, **self.eigenvalue.extra_state()}

    def restore_extra(self, state: Mapping[str, Any]) -> None:
        """Goes to the stage of a state: its space follows from the logits of those before it."""
        past = list(state["past_logits"])
        ends = accumulate(stage.epochs for stage in self.stages[:-1])
        stage = sum(end <= state["epoch"] for end in ends)
        if len(past) != stage:
            raise ValueError(f"past_logits are those of {len(past)} stages, not of {stage}")
        space = self.strategy.space(get_space(self.config.space))
        for number, logits in enumerate(past):
            self.strategy.start_stage(number)
            # Its own values do not matter, nor what it draws for them: `restore` loads the logits
            # and sets the random state afterwards.
            arch = self._logits(space)
            arch.load_state_dict(logits)
            space = self.strategy.next_space(space, arch)
        self._begin_stage(space, past)
        self.eigenvalue.restore(state)

    def graphed(self, bilevel: Bilevel) -> Bilevel | GraphedBilevel:
        """Returns search steps as this run makes them: from CUDA graphs, if it does that."""
        if not self.config.cuda_graph or self.not_graphed is not None:
            return bilevel
        return GraphedBilevel(bilevel, CudaRecorder(self.device))

    def _learning_rate(self) -> float:
        config = self.config
        epochs = self.stages[self.stage].epochs
        return cosine(self.stage_epoch, epochs, config.resolved("lr"), config.lr_min)

    def _begin_stage(self, space: Space, past_logits: list[dict[str, Tensor]]) -> None:
        """Builds what a stage begins with: weights, logits and optimizers.

        Args:
            past_logits: what the stages before it have found.
        """
        # `stage` counts the past logits, so they are set before anything asks for the stage.
        self.space, self.past_logits = space, past_logits
        self.strategy.start_stage(self.stage)
        # The network draws before the logits do, and on the CPU whatever the device is: one seed
        # gives the same search on each device, and another order would give another one.
        self.network = self.build(SEARCH_NETWORKS[space.layout]).to(self.device)
        if self.config.channels_last:
            in_channels_last(self.network)
        self.arch = self._logits(space)
        self._build_optimizers()

    def _logits(self, space: Space) -> ArchParameters:
        strategy = self.strategy
        arch = ArchParameters(space, strategy.alpha_scale, strategy.topology, strategy.tied)
        return arch.to(self.device)

    def _build_optimizers(self) -> None:
        config, capturable = self.config, capturable_on(self.device)
        self.params_optimizer = sgd(
            self.network.parameters(),
            lr=config.resolved("lr"),
            capturable=capturable,
            momentum=config.momentum,
            weight_decay=config.resolved("weight_decay"),
        )
        self.arch_optimizer = adam(
            self.arch.parameters(),
            lr=config.resolved("arch_lr"),
            capturable=capturable,
            betas=self.strategy.alpha_betas,
            weight_decay=config.arch_weight_decay,
        )
        bilevel = Bilevel(
            self.network,
            self.arch,
            self.strategy,
            self.params_optimizer,
            self.arch_optimizer,
            config.grad_clip,
            self.processes,
        )
        self.not_graphed = why_not_graphed(bilevel, self.backend)
        self.bilevel = self.graphed(bilevel)

    def _mixture(self, images: Tensor) -> Tensor:
        """Runs all candidates in eager torch, among them whatever a sampled path may run."""
        space = self.space
        weights = {
            cell: torch.ones(len(space.edges), space.num_candidates(cell))
            for cell in space.cell_types
        }
        network = self.build(reference.SEARCH_NETWORKS[space.layout])
        return network(images, weights)

    def _build_batches(self, images: ImageSource) -> None:
        config = self.config
        try:
            chosen = chosen_images(images, config.images, config.seed)
            labels = images.train_labels.cpu()[chosen]
            train, valid = split_indices(labels, config.train_fraction, config.seed)
            self.valid_index = chosen[valid].to(self.device)
            self.eigenvalue.check_images(len(valid))
            batch_size = config.resolved("batch_size")
            share = self._share_of_batches()
            check_batch_size("batch_size", batch_size, len(train), "for the weights", share)
            check_batch_size("batch_size", batch_size, len(valid), "for the logits", share)
            part = batch_size // share.size
            check_batch_norms("batch_size", part, images.shape, self._mixture)
            # The halves have seeds of their own: with one seed both would be shuffled alike, and
            # the same images would meet in every epoch.
            sizes = {"batch_size": batch_size, "share": share}
            self.train_batches = Batches(chosen[train], seed=config.seed, **sizes)
            self.valid_batches = Batches(chosen[valid], seed=config.seed + 1, **sizes)
            self.train_stream = images.stream(self.train_batches)
            self.valid_stream = images.stream(self.valid_batches)
            self.recalibration_index = self._subset(chosen[train]).to(self.device)
            self.evaluation_index = self._subset(chosen[valid]).to(self.device)
            augment = augmentation(config, images, config.cutout)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{config.data}: {error}") from error
        generator = torch.Generator().manual_seed(config.seed + 2)
        self.pipeline = Pipeline(images, augment, generator, config.channels_last, share)

    def _share_of_batches(self) -> Share:
        """Returns the part of each batch that this process runs: all of it, where samples are
        what the processes share.
        """
        if self.config.spread == "batches":
            return self.processes.share
        self.strategy.share_samples(self.processes.share)
        return WHOLE
