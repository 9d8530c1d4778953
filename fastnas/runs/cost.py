"""Says in reports what the network of a genotype costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastnas.evaluators import Evaluator
from fastnas.evaluators.supernet import SupernetEvaluator
from fastnas.evaluators.training import TrainingEvaluator
from fastnas.nn import EVAL_NETWORKS
from fastnas.nn.cost import network_cost
from fastnas.runs.report import device_name
from fastnas.search.config import TrainConfig
from fastnas.spaces import AnyGenotype
from fastnas.strategies.precision import Precision

CIFAR10 = (3, 32, 32), 10
"""Image and classes of the published networks."""


def genotype_cost(
    genotype: AnyGenotype,
    sizes: Mapping[str, int],
    image: Sequence[int],
    classes: int,
    precision: Precision,
    device: torch.device,
) -> dict[str, Any]:
    """Returns what a report says of the network of a genotype (`cost_figures`).

    Args:
        sizes: its channels and layers.
        image: one that it sees, [C, H, W].
    """
    kind = EVAL_NETWORKS[genotype.layout]
    # Drawing its weights must move nothing of the run.
    with torch.random.fork_rng([]):
        network = kind(genotype, sizes["channels"], classes, sizes["layers"], in_channels=image[0])
    return cost_figures(network.to(device), sizes, image, precision)


def cost_figures(
    network: nn.Module, sizes: Mapping[str, int], image: Sequence[int], precision: Precision
) -> dict[str, Any]:
    """Returns macs, parameters and latency of a network, and what it and the clock were.

    All are of one image in evaluation mode; the latency is the median of several passes.
    """
    device = next(network.parameters()).device
    return {
        **network_cost(network, image, precision.autocast()),
        "latency_device": device_name(device),
        "latency_precision": precision.name,
        "network": {**sizes, "image": list(image)},
    }


def study_cost(evaluator: Evaluator, genotype: AnyGenotype) -> dict[str, Any]:
    """Returns `genotype_cost` of what a study found, on the CPU.

    The network is the one that the evaluator trains, or that the search of its supernet would
    train; of a table it is the published one for CIFAR-10.
    """
    config, (image, classes) = TrainConfig().completed(genotype), CIFAR10
    precision = "fp32"
    if isinstance(evaluator, TrainingEvaluator):
        config = evaluator.config.completed(genotype)
        image, classes = evaluator.images.shape, evaluator.images.classes
        precision = config.precision
    sizes = {name: config.resolved(name) for name in ("channels", "layers")}
    if isinstance(evaluator, SupernetEvaluator):
        own = evaluator.searcher.config
        sizes = {name: own.resolved(f"train_{name}") for name in sizes}
        image, classes = evaluator.searcher.images.shape, evaluator.searcher.images.classes
    device = torch.device("cpu")
    return genotype_cost(genotype, sizes, image, classes, Precision(precision), device)
