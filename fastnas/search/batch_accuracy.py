"""Measures a supernet on weights that are tried, by the statistics of each batch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastnas.nn import SearchNetwork
from fastnas.nn.paths import Weights
from fastnas.processes import Processes
from fastnas.search.build import Answers


def mixed_in_whole_batches(index: Tensor, size: int, seed: int) -> Tensor:
    """Returns images [K] in an order that only the seed decides, in batches of `size` images.

    Their own order may be that of their classes, which no batch should be of alone. What is left
    over is left out: a batch of one image may have no statistics.
    """
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))
    return index[order.to(index.device)[: len(index) // size * size]]


@torch.no_grad()
def batch_accuracy(
    network: SearchNetwork,
    weights: Weights,
    batches: Iterable[tuple[Tensor, Tensor]],
    processes: Processes,
) -> float | None:
    """Returns the share of right answers over all processes; None: a logit is not finite.

    Running statistics are those of other weights, so each batch is normalised by its own, as in
    training; what that changes in the network is put back.

    Args:
        batches: images and labels, of this process.
    """
    device = next(network.parameters()).device
    before = [buffer.clone() for buffer in network.buffers()]
    was_training, answers, count = network.training, Answers(device), 0
    network.train()
    for images, labels in batches:
        answers.add(network(images, weights), labels)
        count += len(labels)
    network.train(was_training)
    for buffer, value in zip(network.buffers(), before):
        buffer.copy_(value)
    answers.join(processes)
    total = int(processes.total(torch.tensor(count)))
    return int(answers.right) / total if answers.finite else None
