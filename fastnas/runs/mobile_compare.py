"""Times the search step of a run of the MobileNet-like space beside eager's, as `compare` does."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam

from fastnas.nn import count_parameters
from fastnas.reference import mobilenet as eager_mobilenet
from fastnas.reference.amp import Amp
from fastnas.runs.compare import Side, beside, compared_if_it_fits
from fastnas.runs.eager_memory import why_not_fitting
from fastnas.saved_bytes import saved_bytes
from fastnas.search.mobile_searcher import MobileSearcher, RememberedLoss
from fastnas.search.optimizers import adam, capturable_on, sgd
from fastnas.spaces.mobile import SKIP
from fastnas.strategies.single_path import SinglePath
from fastnas.strategies.steps import Batch


def mobile_comparison(searcher: MobileSearcher, steps: int) -> dict[str, Any]:
    """Returns what `fastnas.runs.compare.comparison` does."""

    def why_not() -> str | None:
        return why_not_fitting(
            lambda: eager_mobile_bytes(searcher), searcher.network, searcher.device
        )

    return compared_if_it_fits(why_not, lambda: compare_mobile(searcher, steps))


def compare_mobile(searcher: MobileSearcher, steps: int) -> dict[str, float]:
    """Times first-order steps, this run's and eager's in turn, on copies of the run's network.

    Eager keeps what each candidate keeps, activations in place, and computes all gradients in both
    halves; noise is from torch's generator.

    Returns:
        As `fastnas.runs.compare.compare_with_eager`.
    """
    train, valid = searcher.train_half.draw(), searcher.valid_half.draw()
    searcher.close()  # what reads ahead would take CPU time from what is timed
    sides = [_ours(searcher, train, valid), _eager(searcher, train, valid)]
    return beside(sides, [train[0], valid[0]], steps, searcher.device)


def eager_mobile_bytes(searcher: MobileSearcher) -> int:
    """Returns what one pass of the eager network will hold for its backward pass.

    The shapes of a training batch are followed on the device "meta". Of a single path it is that of
    the candidate with most parameters in each layer, which holds most.
    """
    device, size = torch.device("meta"), searcher.train_batches.batch_size
    # The run's generators must not move, or asking would change what comes after.
    with torch.random.fork_rng([]), device:
        network = _built(searcher).train()
        images = torch.empty(size, *searcher.images.shape)
        labels = torch.zeros(size, dtype=torch.int64)
        for layer in network.layers:
            assert isinstance(layer, eager_mobilenet.MobileMixture)
            if layer.mixing == "gdas":
                # A sample is a number on the host, which "meta" has not. Its weight is that of a
                # mixture of one.
                heaviest = max(layer.candidates.items(), key=lambda item: count_parameters(item[1]))
                layer.candidates = nn.ModuleDict(dict([heaviest]))
                layer.logits = nn.Parameter(torch.empty(1))
                layer.mixing = "softmax"
        saved = saved_bytes(
            lambda: F.cross_entropy(network(images), labels),
            exclude=[*network.parameters(), *network.buffers(), images],
        )
    return saved


def _built(searcher: MobileSearcher) -> eager_mobilenet.MobileNetSearchNetwork:
    noise = searcher.strategy.skip_noise()
    return eager_mobilenet.MobileNetSearchNetwork(
        searcher.images.classes,
        space=searcher.space,
        mixing=searcher.config.chain.mixing,
        noise=None if noise is None else {SKIP: noise},
        in_channels=searcher.images.channels,
    )


def _ours(searcher: MobileSearcher, train: Batch, valid: Batch) -> Side:
    network = searcher.build().to(searcher.device)
    network.load_state_dict(searcher.network.state_dict())
    searcher.set_schedules(network.train())
    # Eager makes a first-order step, so the unrolled one would be compared with less work.
    made = searcher.steps_on(network, _still_optimizers(network), RememberedLoss(), order=1)

    def step() -> None:
        made.step(train, valid)

    return Side(step, step, network)


def _eager(searcher: MobileSearcher, train: Batch, valid: Batch) -> Side:
    strategy, network = searcher.strategy, _built(searcher).to(searcher.device)
    network.load_state_dict(searcher.network.state_dict())
    samples, tau = 1, 1.0
    if isinstance(strategy, SinglePath):
        samples, tau = strategy.samples, strategy.tau
    network.set_schedules(strategy.noise_amplitude(searcher.epoch, searcher.epochs), tau)
    weights, logits = _still_optimizers(network.train())
    amp = Amp(searcher.precision.dtype, searcher.device)

    def step() -> None:
        eager_mobilenet.mobile_search_step(network, weights, logits, train, valid, samples, amp=amp)

    return Side(step, step, network)


def _still_optimizers(network: nn.Module) -> tuple[SGD, Adam]:
    """Makes the optimizers of a search with rate 0, so that every timed step does the same work."""
    named = list(network.named_parameters())
    logits = [p for name, p in named if name.endswith(".logits")]
    weights = [p for name, p in named if not name.endswith(".logits")]
    capturable = capturable_on(logits[0].device)
    of_weights = sgd(weights, lr=0.0, capturable=capturable, momentum=0.9, weight_decay=3e-4)
    return of_weights, adam(logits, lr=0.0, capturable=capturable)
