"""Says in reports what the network of a genotype costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastnas.evaluators import Evaluator
from fastnas.evaluators.supernet import SupernetEvaluator
from fastnas.evaluators.training import TrainingEvaluator
from fastnas.nn import MobileNetEvalNetwork
from fastnas.nn.cost import network_cost
from fastnas.runs.columns import column_layers
from fastnas.runs.report import device_name
from fastnas.search.config import TrainConfig
from fastnas.search.trained import trained
from fastnas.spaces import AnyGenotype
from fastnas.spaces.mobile_genotype import Architecture
from fastnas.strategies.precision import Precision

CIFAR10 = (3, 32, 32), 10
"""Image and classes of the published networks."""


def genotype_cost(
    genotype: Architecture,
    config: TrainConfig,
    image: Sequence[int],
    classes: int,
    precision: Precision,
    device: torch.device,
) -> dict[str, Any]:
    """Returns what a report says of the network of a genotype (`cost_figures`).

    Args:
        config: of its training, whose sizes the network has.
        image: one that it sees, [C, H, W].
    """
    config = config.completed(genotype)
    # Drawing its weights must move nothing of the run.
    with torch.random.fork_rng([]):
        network = trained(genotype).network(config, classes, image[0])
    return cost_figures(network.to(device), genotype, config, image, precision)


def cost_figures(
    network: nn.Module,
    genotype: Architecture,
    config: TrainConfig,
    image: Sequence[int],
    precision: Precision,
) -> dict[str, Any]:
    """Returns macs, parameters and latency of a network, and what it and the clock were.

    All are of one image in evaluation mode; the latency is the median of several passes. Of a
    column there are the figures of each layer besides.

    Args:
        config: completed, of its training.
    """
    device = next(network.parameters()).device
    sizes = {name: config.resolved(name) for name in trained(genotype).sizes}
    layers = {}
    if isinstance(network, MobileNetEvalNetwork):
        layers = {"layers": column_layers(network, image)}
    return {
        **network_cost(network, image, precision.autocast()),
        "latency_device": device_name(device),
        "latency_precision": precision.name,
        "network": {**sizes, "image": list(image)},
        **layers,
    }


def study_cost(evaluator: Evaluator, genotype: AnyGenotype) -> dict[str, Any]:
    """Returns `genotype_cost` of what a study found, on the CPU.

    The network is the one that the evaluator trains, or that the search of its supernet would
    train; of a table it is the published one for CIFAR-10. Of cells that have none, which are only
    looked up, nothing is returned.
    """
    if not trained(genotype).defaults:
        return {}
    config, (image, classes) = TrainConfig(), CIFAR10
    precision = "fp32"
    if isinstance(evaluator, TrainingEvaluator):
        config = evaluator.config
        image, classes = evaluator.images.shape, evaluator.images.classes
        precision = config.precision
    if isinstance(evaluator, SupernetEvaluator):
        own = evaluator.searcher.config
        layers = own.resolved("train_layers")
        config = replace(config, channels=own.train_channels, layers=layers)
        image, classes = evaluator.searcher.images.shape, evaluator.searcher.images.classes
    device = torch.device("cpu")
    return genotype_cost(genotype, config, image, classes, Precision(precision), device)
