"""Takes the batch-norm statistics of a path anew, in place of those of all sampled paths."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from fastnas.nn import SearchNetwork
from fastnas.nn.paths import Weights


class _Path(nn.Module):
    def __init__(self, network: SearchNetwork, weights: Weights) -> None:
        super().__init__()
        self.network, self.weights = network, weights

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x, self.weights)


def recalibrated(
    network: SearchNetwork, weights: Weights, batches: Iterable[Tensor]
) -> SearchNetwork:
    """Returns a copy whose batch norms hold the mean statistics of `batches` on one path.

    While paths are sampled, an operation sees the states of many, and its running statistics are
    those of none; before one path is validated they are taken anew on training images (Guo et al.,
    Single Path One-Shot Neural Architecture Search, ECCV 2020, section 3.4).

    Args:
        weights: of the path, as `SearchNetwork.forward` takes them.
        batches: images [N, in_channels, H, W].
    """
    found = copy.deepcopy(network)
    # It resets the statistics and takes the plain mean over the batches (momentum None), so no
    # batch weighs more because it came last.
    update_bn(batches, _Path(found, weights))
    return found
