"""Searches the MobileNet-like space: a `ChoiceSearch` in a run that can stop and go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from fastnas.nn import MobileNetSearchNetwork, Paths, split_parameters
from fastnas.search.build import accuracy, cosine
from fastnas.search.choice_cost import ChoiceCost
from fastnas.search.choice_search import ChoiceSearch
from fastnas.search.config import ConfigError
from fastnas.search.gradient_run import GradientRun
from fastnas.search.mobile_config import MobileConfig
from fastnas.search.monitor import entropy, has_collapsed
from fastnas.search.optimizers import capturable_on, set_learning_rate
from fastnas.spaces.mobile import SKIP, MobileSpace
from fastnas.spaces.mobile_genotype import MobileGenotype, mobile_space
from fastnas.strategies.fair_darts import FairDARTS
from fastnas.strategies.margins import Undecided, within_noise
from fastnas.strategies.mixture import Mixture
from fastnas.strategies.single_path import SinglePath
from fastnas.strategies.steps import Batch


class RememberedLoss:
    """Computes the cross entropy, and remembers the logits of its last call for the accuracy."""

    logits: Tensor

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        logits = network(images)
        self.logits = logits.detach()
        return F.cross_entropy(logits, labels)


class Half:
    """Draws the batches of a half of the data; iterated over, those of an epoch.

    Args:
        draw: returns the next batch.
        count: returns how many an epoch has.
    """

    def __init__(self, draw: Callable[[], Batch], count: Callable[[], int]) -> None:
        self.draw, self.count = draw, count

    def __iter__(self) -> Iterator[Batch]:
        return (self.draw() for _ in range(self.count()))


class MobileSearcher(GradientRun):
    """Searches for a column, from a config to a genotype; arguments and errors as `GradientRun`.

    `ChoiceSearch` makes the steps. Temperature, amplitude of the noise and learning rate are set
    when an epoch begins, and again when a run resumes within it.
    """

    skips = "skips"
    remembered: ClassVar = {"skips": int, "genotype": str, "collapsed": bool}
    config: MobileConfig
    network: MobileNetSearchNetwork
    cost: ChoiceCost | None

    @property
    def space(self) -> MobileSpace:
        return mobile_space(self.config.width, self.config.stem_stride)

    def begin(self) -> None:
        self.network = self.build().to(self.device)
        self.optimizer_pair = self.optimizers(
            *split_parameters(self.network), capturable_on(self.device)
        )
        # Streams and pipeline are built after the network: they are asked for when they are used.
        self.train_half = Half(
            lambda: self.pipeline(self.train_stream), lambda: self.steps_per_epoch
        )
        self.valid_half = Half(
            lambda: self.pipeline(self.valid_stream), lambda: self.steps_per_epoch
        )
        self.loss = RememberedLoss()
        config = self.config
        # The blocks cost what they cost in the derived network, squeeze and excitation apart.
        image = torch.zeros(1, *self.images.shape, device=self.device)
        label = torch.zeros(1, dtype=torch.int64, device=self.device)
        cost: dict[str, Any] = {}
        if config.cost is not None:
            cost = {"cost": config.cost, "cost_weight": config.cost_weight}
            cost["cost_batch"] = image, label
        try:
            self.choice_search = self.steps_on(self.network, self.optimizer_pair, self.loss, **cost)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.precision, self.cost = self.choice_search.precision, self.choice_search.cost

    def build(self, memory: str | None = None) -> MobileNetSearchNetwork:
        """Builds the supernet, on torch's default device.

        Args:
            memory: what is kept for backward; None: as the config says.
        """
        noise = self.strategy.skip_noise()
        return MobileNetSearchNetwork(
            self.images.classes,
            space=self.space,
            mixing=self.config.chain.mixing,
            memory=memory or self.config.memory,
            noise=None if noise is None else {SKIP: noise},
            in_channels=self.images.channels,
        )

    def steps_on(
        self,
        network: MobileNetSearchNetwork,
        optimizers: tuple[Optimizer, Optimizer],
        loss: RememberedLoss,
        order: int | None = None,
        **cost: Any,
    ) -> ChoiceSearch:
        """Makes what steps as the method does.

        Args:
            optimizers: of the weights and of the logits.
            order: of the gradient of the logits; None: the method's.
            cost: as `ChoiceSearch` takes it.
        """
        strategy = self.strategy
        if order is None:
            order = strategy.order if isinstance(strategy, Mixture) else 1
        return ChoiceSearch(
            network,
            self.train_half,
            self.valid_half,
            epochs=self.epochs,
            loss=loss,
            order=order,
            samples=strategy.samples if isinstance(strategy, SinglePath) else 1,
            zero_one_weight=strategy.zero_one_weight if isinstance(strategy, FairDARTS) else 0.0,
            weight_optimizer=optimizers[0],
            logit_optimizer=optimizers[1],
            grad_clip=self.config.grad_clip,
            precision=self.config.precision,
            **cost,
        )

    @property
    def epochs(self) -> int:
        epochs: int = self.config.resolved("epochs")
        return epochs

    def genotype(self) -> MobileGenotype:
        config = self.config
        return MobileGenotype(self.network.derive(), config.width, config.stem_stride)

    def undecided(self) -> Undecided:
        """Counts the layers whose choice the initial noise may have made."""
        best = (choice.own_logits().detach().double().topk(2) for choice in self.network.choices)
        margins = [float(top.values[0] - top.values[1]) for top in best]
        return within_noise({"column": margins}, self.strategy.alpha_scale, "layers")["column"]

    def validation_weights(self) -> list[Paths] | None:
        if self.config.chain.mixing not in self.network.choices[0].sampled:
            return None
        # In training mode, in which statistics are taken anew, the network would sample.
        return [
            Paths(logits.argmax(), logits.new_ones(()))
            for logits in (choice.own_logits().detach() for choice in self.network.choices)
        ]

    def mixture(self, images: Tensor) -> Tensor:
        network = self.build("eager")
        weights = [torch.ones(len(choice.names)) for choice in network.choices]
        y: Tensor = network(images, weights)
        return y

    def checkpointed(self) -> dict[str, Any]:
        return {
            "network": self.network,
            "weight_optimizer": self.optimizer_pair[0],
            "logit_optimizer": self.optimizer_pair[1],
            "train_batches": self.train_batches,
            "valid_batches": self.valid_batches,
            **self.precision.parts(),
            **({} if self.cost is None else {"cost": self.cost}),
        }

    def start_epoch(self) -> None:
        strategy = self.strategy
        set_learning_rate(self.optimizer_pair[0], self._learning_rate())
        strategy.start_epoch(self.epoch, self.epochs)
        self.set_schedules(self.network)
        self.network.train()

    def set_schedules(self, network: MobileNetSearchNetwork) -> None:
        """Sets the amplitude of the noise and the temperature of the epoch under way."""
        strategy = self.strategy
        network.set_noise_amplitude(strategy.noise_amplitude(self.epoch, self.epochs))
        if isinstance(strategy, SinglePath):
            network.set_tau(strategy.tau)

    def run_step(self) -> None:
        # The batch of the weights is made first: both take their augmentation from one generator,
        # so the order belongs to the bits of the run.
        train = self.train_half.draw()
        if self._moves_logits:
            figures = self.choice_search.step(train, self.valid_half.draw())
        else:
            figures = {"train_loss": self.choice_search.weight_step(train)}
        # The weights are moved last, so that these are the logits of the training images.
        self.add(**figures, train_accuracy=accuracy(self.loss.logits, train[1]))

    @property
    def _moves_logits(self) -> bool:
        return bool(self.epoch >= self.config.resolved("arch_start_epoch"))

    def end_epoch(self) -> dict[str, Any]:
        genotype, layers = self.genotype(), self.space.layers
        figures: dict[str, Any] = {
            "skips": sum(block == SKIP for block in genotype.architecture),
            "entropy": self._entropy(),
            **self.strategy.figures(),
        }
        skips = [*(past["skips"] for past in self.history), figures["skips"]]
        figures["collapsed"] = has_collapsed(skips, sum(layer.may_skip for layer in layers))
        figures["lr"] = self._learning_rate()
        figures["noise_amplitude"] = self.strategy.noise_amplitude(self.epoch, self.epochs)
        figures |= {} if self.cost is None else self.cost.figures()
        figures["genotype"] = genotype.text
        return figures | self.judged(searched=self._moves_logits)

    def _entropy(self) -> float:
        """Returns the mean over the layers, each a share of its own maximum."""
        sigmoids = self.config.chain.mixing == "sigmoid"
        logits = [choice.own_logits().detach() for choice in self.network.choices]
        weights = [alpha.sigmoid() if sigmoids else alpha.softmax(-1) for alpha in logits]
        return sum(map(entropy, weights)) / len(weights)

    def decisions(self, figures: Mapping[str, Any]) -> str:
        return f"skips {figures['skips']}  entropy {figures['entropy']:.3f}"

    def _learning_rate(self) -> float:
        config = self.config
        return cosine(self.epoch, self.epochs, config.resolved("lr"), config.resolved("lr_min"))
