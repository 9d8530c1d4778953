"""Runs a search: stages, epochs, batches, two optimizers, a strategy, a monitor."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from rich.console import Console
from torch import Tensor
from torch.optim import Adam

from fastnas import reference
from fastnas.data.source import ImageSource
from fastnas.nn import SEARCH_NETWORKS, ArchParameters, SearchNetwork
from fastnas.nn.paths import Weights
from fastnas.processes import WHOLE, Share
from fastnas.search.batch_accuracy import batch_accuracy, mixed_in_whole_batches
from fastnas.search.bilevel import Bilevel
from fastnas.search.build import accuracy, cosine, in_channels_last
from fastnas.search.cell_costs import cost_of_search
from fastnas.search.config import ConfigError, SearchConfig
from fastnas.search.cuda_graph import CudaRecorder, GraphedBilevel, why_not_graphed
from fastnas.search.early_stop import EarlyStop
from fastnas.search.eigenvalue import EigenvalueMonitor
from fastnas.search.gradient_run import GradientRun
from fastnas.search.monitor import has_collapsed, observe
from fastnas.search.optimizers import capturable_on, set_learning_rate
from fastnas.spaces import AnyGenotype, Space, get_space, layout_of
from fastnas.strategies.cost import CostTerm

Network = TypeVar("Network", bound=reference.SearchNetwork)

logger = logging.getLogger("fastnas")


class Searcher(GradientRun):
    """Searches for cells, from a config to a genotype; arguments and errors as `GradientRun`."""

    skips = "skips_normal"
    remembered: ClassVar = {"skips_normal": int, "genotype": str, "collapsed": bool}
    config: SearchConfig
    network: SearchNetwork
    cost: CostTerm | None
    arch_optimizer: Adam

    def begin(self) -> None:
        config = self.config
        space = self.strategy.space(get_space(config.space))
        try:
            layers, epochs = config.resolved("layers"), config.resolved("epochs")
            self.stages = self.strategy.stages(layers, epochs)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.eigenvalue = EigenvalueMonitor(config, self.epochs)
        self.cost = cost_of_search(config, self.strategy, space, self.images, self.device)
        self._begin_stage(space, [])

    def build(self, kind: type[Network]) -> Network:
        """Builds a search network of the stage's sizes, of one of the kinds that run it."""
        config = self.config
        network = kind(
            self.strategy.network_space(self.space),
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
    def channels_last(self) -> bool:
        return self.config.channels_last

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

    def genotype(self) -> AnyGenotype:
        return self.strategy.derive(self.arch, self.space)

    def search(self, out: Path, console: Console) -> None:
        if self.config.cuda_graph and self.not_graphed is not None:
            logger.warning("fastnas: the search runs without CUDA graphs: %s", self.not_graphed)
        super().search(out, console)

    def validation_weights(self) -> Any:
        return self.strategy.validation_weights(self.arch)

    def checkpointed(self) -> dict[str, Any]:
        return {
            "network": self.network,
            "arch": self.arch,
            "params_optimizer": self.params_optimizer,
            "arch_optimizer": self.arch_optimizer,
            "train_batches": self.train_batches,
            "valid_batches": self.valid_batches,
            **self.precision.parts(),
            **({} if self.cost is None else {"cost": self.cost}),
        }

    def identity(self) -> dict[str, Any]:
        """Adds the sizes of the derived network, whose cost the logits have paid for."""
        sizes = () if self.cost is None else ("train_channels", "train_layers")
        return {**super().identity(), **{name: getattr(self.config, name) for name in sizes}}

    def share_of_batches(self) -> Share:
        if self.config.spread == "batches":
            return super().share_of_batches()
        self.strategy.share_samples(self.processes.share)
        return WHOLE

    def start_epoch(self) -> None:
        epoch, epochs = self.stage_epoch, self.stages[self.stage].epochs
        set_learning_rate(self.params_optimizer, self._learning_rate())
        self.strategy.start_epoch(epoch, epochs)
        self.network.set_noise_amplitude(self.strategy.noise_amplitude(epoch, epochs))
        self.network.train()
        self.strategy.decide(epoch, self.arch, self._accuracy_on)

    def run_step(self) -> None:
        train = self.pipeline(self.train_stream)
        if self._moves_logits:
            # The batch of the weights is made first: both take their augmentation from one
            # generator, so the order belongs to the bits of the run.
            valid = self.pipeline(self.valid_stream)
            self.add(valid_loss=self.bilevel.arch_step(valid, train))
        loss, logits = self.bilevel.weight_step(train)
        self.add(train_loss=loss, train_accuracy=accuracy(logits, train[1]))

    def end_epoch(self) -> dict[str, Any]:
        genotype = self.genotype()
        with torch.no_grad():
            weights = self.strategy.mixing_weights(self.arch)
        figures: dict[str, Any] = observe(weights, genotype) | self.strategy.figures()
        skips = [*(past["skips_normal"] for past in self.history), figures["skips_normal"]]
        figures["collapsed"] = has_collapsed(skips, self.space.kept_edges)
        figures["lr"] = self._learning_rate()
        epoch, epochs = self.stage_epoch, self.stages[self.stage].epochs
        figures["noise_amplitude"] = self.strategy.noise_amplitude(epoch, epochs)
        figures |= {} if self.cost is None else self.cost.figures(self.arch)
        figures["genotype"] = layout_of(genotype).text(genotype)
        figures |= self.eigenvalue.measured(self)
        return figures | self.judged(searched=self._moves_logits)

    @property
    def _moves_logits(self) -> bool:
        """Tells whether the network has been trained for so long that its logits move."""
        first = max(s for s in range(self.stage + 1) if not self.stages[s].continues)
        before = sum(stage.epochs for stage in self.stages[first : self.stage])
        start: int = self.config.resolved("arch_start_epoch")
        return before + self.stage_epoch >= start

    def _accuracy_on(self, weights: Weights) -> float:
        """Returns the supernet's accuracy on weights, by the statistics of each batch."""
        labels, size = self.pipeline.images.train_labels, self.train_batches.batch_size
        chosen = mixed_in_whole_batches(self.valid_index, size, self.config.seed)
        mine = self.processes.share.spread(chosen)
        batches = (
            (batch, labels[index]) for index, batch in self.plain(mine, size // self.processes.size)
        )
        with self.precision.autocast():
            found = batch_accuracy(self.network, weights, batches, self.processes)
        if found is None:
            raise self.diverged("a logit of a decision is not finite", self.step)
        return found

    def decisions(self, figures: Mapping[str, Any]) -> str:
        cells = self.space.cell_types
        skips = [str(figures[f"skips_{cell}"]) for cell in cells]
        entropies = [f"{figures[f'entropy_{cell}']:.3f}" for cell in cells]
        measured = f"  eigenvalue {figures['eigenvalue']:.3f}" if "eigenvalue" in figures else ""
        return f"skips {'|'.join(skips)}  entropy {'|'.join(entropies)}{measured}"

    def epoch_line(self) -> str:
        line, stop = super().epoch_line(), self.early_stop
        return line if stop is None else f"{line}\n{stop.text(self.epochs)}"

    def after_epoch(self) -> None:
        """Begins the next stage where one has ended, or goes back where the search stops early."""
        if self.early_stop is not None:
            self.arch.load_state_dict(self.eigenvalue.logits_of(self.early_stop.rollback))
        if self.stage_epoch == self.stages[self.stage].epochs and not self.finished:
            space = self.strategy.next_space(self.space, self.arch)
            # They are copies: a stage may go on with these very logits.
            found = {name: logits.clone() for name, logits in self.arch.state_dict().items()}
            self._begin_stage(space, [*self.past_logits, found])

    def extra_state(self) -> dict[str, Any]:
        of_method = self.strategy.state_dict()
        return {
            "past_logits": self.past_logits,
            **({"method": of_method} if of_method else {}),
            **self.eigenvalue.extra_state(),
        }

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
        self.strategy.load_state_dict(state.get("method", {}))
        self.eigenvalue.restore(state)

    def graphed(self, bilevel: Bilevel) -> Bilevel | GraphedBilevel:
        """Returns search steps as this run makes them: from CUDA graphs, if it does that."""
        if not self.config.cuda_graph or self.not_graphed is not None:
            return bilevel
        return GraphedBilevel(bilevel, CudaRecorder(self.device))

    def _learning_rate(self) -> float:
        config, stage = self.config, self.stages[self.stage]
        rates = config.resolved("lr"), config.resolved("lr_min")
        if stage.constant_rate is not None:
            return stage.constant_rate * float(rates[0])
        return cosine(self.stage_epoch, stage.epochs, *rates)

    def _begin_stage(self, space: Space, past_logits: list[dict[str, Tensor]]) -> None:
        """Builds what a stage begins with: weights, logits and optimizers.

        Args:
            past_logits: what the stages before it have found.
        """
        # `stage` counts the past logits, so they are set before anything asks for the stage.
        self.space, self.past_logits = space, past_logits
        if self.cost is not None:
            self.cost.enter(space)
        self.strategy.start_stage(self.stage)
        if self.stages[self.stage].continues:
            # Of a run that is resumed they are those of its first stage, into which it then loads.
            self._build_optimizers(self.arch_optimizer)
            return
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

    def _build_optimizers(self, of_logits: Adam | None = None) -> None:
        """Makes the optimizers and the step; that of the logits is given where it goes on."""
        self.params_optimizer, fresh = self.optimizers(
            self.network.parameters(), self.arch.parameters(), capturable_on(self.device)
        )
        self.arch_optimizer = of_logits or fresh
        bilevel = Bilevel(
            self.network,
            self.arch,
            self.strategy,
            self.params_optimizer,
            self.arch_optimizer,
            self.config.grad_clip,
            self.precision,
            self.cost,
        )
        self.not_graphed = why_not_graphed(bilevel, self.backend)
        self.bilevel = self.graphed(bilevel)

    def mixture(self, images: Tensor) -> Tensor:
        network = self.build(reference.SEARCH_NETWORKS[self.space.layout])
        space = network.space
        weights = {
            cell: torch.ones(len(space.edges), space.num_candidates(cell))
            for cell in space.cell_types
        }
        return network(images, weights)

    def _build_batches(self, images: ImageSource) -> None:
        super()._build_batches(images)
        self.eigenvalue.check_images(len(self.valid_index))
