"""Describes what can be trained from scratch: what networks of cells and of columns differ in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from fastnas.nn import EVAL_NETWORKS, MobileNetEvalNetwork
from fastnas.spaces import AnyGenotype, MobileGenotype, layout_of, to_json
from fastnas.spaces.mobile_genotype import Architecture

if TYPE_CHECKING:
    from fastnas.search.config import TrainConfig

OF_CELLS = ("channels", "layers", "drop_path", "auxiliary", "auxiliary_weight")
OF_COLUMNS = ("width", "stem_stride", "squeeze", "activation")


class Trained(ABC):
    """Answers what `Trainer` asks of an architecture.

    Attributes:
        title: of the kind, after "the network of".
        text: the architecture, as its code base writes it.
        json: the same, with all that its file needs.
        defaults: settings with which its paper trains it.
        absent: settings that its network does not have.
        sizes: settings that its network is built by.
    """

    title: str
    text: str
    json: str
    defaults: Mapping[str, Any]
    absent: Sequence[str]
    sizes: Sequence[str]

    @abstractmethod
    def network(self, config: TrainConfig, classes: int, channels: int) -> nn.Module:
        """Builds its network, on torch's default device.

        Args:
            config: completed.
            classes: outputs.
            channels: of the images.

        Raises:
            TypeError, ValueError: it has no such network.
        """

    @abstractmethod
    def sized(self, config: TrainConfig) -> Architecture:
        """Returns the architecture in the sizes that the config gives it."""

    def options(self, config: TrainConfig) -> dict[str, Any]:
        """Returns settings of the network that a search may change until it is trained."""
        return {}


class TrainedCells(Trained):
    """Describes a genotype of cells."""

    sizes = ("channels", "layers")

    def __init__(self, genotype: AnyGenotype) -> None:
        layout = layout_of(genotype)
        self.genotype = genotype
        self.title = f"a {layout.title} cell"
        self.text, self.json = layout.text(genotype), to_json(genotype)
        self.defaults = layout.training_defaults
        self.absent = (*layout.absent_in_training, *OF_COLUMNS)
        self._has_auxiliary = "auxiliary" not in layout.absent_in_training

    def network(self, config: TrainConfig, classes: int, channels: int) -> nn.Module:
        options = {"auxiliary": config.resolved("auxiliary")} if self._has_auxiliary else {}
        network: nn.Module = EVAL_NETWORKS[self.genotype.layout](
            self.genotype,
            config.resolved("channels"),
            classes,
            config.resolved("layers"),
            in_channels=channels,
            **options,
        )
        return network

    def sized(self, config: TrainConfig) -> AnyGenotype:
        return self.genotype


class TrainedColumn(Trained):
    """Describes a column of the MobileNet-like space.

    Settings are those of ProxylessNAS' code (Cai et al., ICLR 2019) for ImageNet, without its label
    smoothing and with weight decay on batch norms. FairNAS and NoisyDARTS have published networks
    that are trained, not their training.
    """

    title = "a MobileNet-like column"
    absent = OF_CELLS
    sizes = OF_COLUMNS

    def __init__(self, genotype: MobileGenotype) -> None:
        self.genotype = genotype
        self.text, self.json = genotype.text, genotype.to_json()
        self.defaults = {
            "epochs": 300, "batch_size": 256, "lr": 0.05, "nesterov": True, "weight_decay": 4e-5,
            "cutout": 0, **dict.fromkeys(("drop_path", "auxiliary", "auxiliary_weight"), 0),
            "width": genotype.width, "stem_stride": genotype.stem_stride,
            "squeeze": False, "activation": "relu6",
        }  # fmt: skip

    def network(self, config: TrainConfig, classes: int, channels: int) -> nn.Module:
        genotype = self.sized(config)
        return MobileNetEvalNetwork(
            genotype.architecture,
            classes,
            space=genotype.space,
            squeeze=config.resolved("squeeze"),
            activation=config.resolved("activation"),
            in_channels=channels,
        )

    def sized(self, config: TrainConfig) -> MobileGenotype:
        width, stride = config.resolved("width"), config.resolved("stem_stride")
        return replace(self.genotype, width=width, stem_stride=stride)

    def options(self, config: TrainConfig) -> dict[str, Any]:
        return {name: config.resolved(name) for name in ("squeeze", "activation")}


def trained(architecture: Architecture) -> Trained:
    """Returns the description of an architecture."""
    if isinstance(architecture, MobileGenotype):
        return TrainedColumn(architecture)
    return TrainedCells(architecture)
