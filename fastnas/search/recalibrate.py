"""Takes the batch-norm statistics of a path anew, in place of those of all sampled paths."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

Network = TypeVar("Network", bound=nn.Module)


class _Path(nn.Module):
    def __init__(self, network: nn.Module, weights: Any) -> None:
        super().__init__()
        self.network, self.weights = network, weights

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.network(x, self.weights)
        return y


def recalibrated(network: Network, weights: Any, batches: Iterable[Tensor]) -> Network:
    """Returns a copy whose batch norms hold the mean statistics of `batches` on one path.

    While paths are sampled, an operation sees the states of many, and its running statistics are
    those of none; before one path is validated they are taken anew on training images (Guo et al.,
    Single Path One-Shot Neural Architecture Search, ECCV 2020, section 3.4).

    Args:
        network: called with images and the weights.
        weights: of the path, as its `forward` takes them.
        batches: images [N, in_channels, H, W].
    """
    found = copy.deepcopy(network)
    # It resets the statistics and takes the plain mean over the batches (momentum None), so no
    # batch weighs more because it came last.
    update_bn(batches, _Path(found, weights))
    return found
