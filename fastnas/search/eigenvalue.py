"""Measures the dominant eigenvalue of the architecture's Hessian while a search runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnas.search.config import ConfigError, SearchConfig
from fastnas.search.early_stop import EarlyStop, early_stop
from fastnas.search.hessian import Eigenvalue, dominant_eigenvalue, hessian_products
from fastnas.strategies.hypergradient import frozen

if TYPE_CHECKING:
    from fastnas.search.searcher import Searcher

KEPT_LOGITS = "kept_logits"


class EigenvalueMonitor:
    """Measures every N epochs, and decides on an early stop where the config asks for one.

    What is measured is the largest eigenvalue of d2 L_val / d alpha2 + arch_weight_decay I, over
    all logits of all cell types, after the epoch, as RobustDARTS' code has it. L_val is the cross
    entropy of the network in training mode (batch statistics, noise on) on the weights that the
    method validates it on, without its regulariser. The batch is drawn anew for each epoch from the
    images of the logits; it is not augmented. A measurement changes no bit of the search: its
    random numbers are its own, and running statistics are put back. It is in float32 whatever the
    run computes in.

    Epochs 0, N, 2 N, ... and the last are measured, counted from 0. Each of several processes
    measures on the whole batch.

    Args:
        epochs: of all stages of the search.
    """

    def __init__(self, config: SearchConfig, epochs: int) -> None:
        self.config = config
        self.epochs = epochs
        self.kept: list[dict[str, Tensor]] = []
        """Logits after each epoch measured, where the search may go back to them."""

    @property
    def images(self) -> int:
        """Returns how many images a measurement is on."""
        given = self.config.eigenvalue_images
        return int(self.config.resolved("batch_size")) if given is None else given

    @property
    def may_stop(self) -> bool:
        return self.config.early_stop == "eigenvalue"

    def check_images(self, available: int) -> None:
        """Refuses more images than there are for the logits (ConfigError)."""
        if self.config.eigenvalue_every and self.images > available:
            raise ConfigError(
                f"eigenvalue_images is {self.images}; at most {available} is allowed, the images"
                " for the logits"
            )

    def is_due(self, epoch: int) -> bool:
        """Tells whether an epoch, from 0, is measured."""
        every = self.config.eigenvalue_every
        return bool(every) and (epoch % every == 0 or epoch + 1 == self.epochs)

    def measured(self, searcher: Searcher) -> dict[str, float]:
        """Returns the figures of the epoch under way, none where it is not measured.

        `eigenvalue_error` is the distance within which an eigenvalue lies.

        Raises:
            DivergedError: a second derivative is not finite.
        """
        if not self.is_due(searcher.epoch):
            return {}
        try:
            found = self._measure(searcher)
        except ValueError as error:
            text = "the Hessian of the logits is not finite"
            raise searcher.diverged(text, searcher.step - 1) from error
        if self.may_stop:
            state = searcher.arch.state_dict()
            self.kept.append({name: t.detach().cpu().clone() for name, t in state.items()})
        # All processes have computed the same; their mean makes it the same to the last bit, or
        # one of them could stop where another goes on.
        pair = torch.tensor([found.value, found.error], dtype=torch.float64, device=searcher.device)
        names = ("eigenvalue", "eigenvalue_error")
        return dict(zip(names, searcher.processes.means([pair])[0].tolist()))

    def stop(self, history: Sequence[Mapping[str, Any]]) -> EarlyStop | None:
        """Returns where a search with this history has stopped early, or None."""
        if not self.may_stop:
            return None
        # After the last epoch there is nothing left to stop, and the public code does not ask.
        asked = [h for h in history if self.is_due(h["epoch"]) and h["epoch"] + 1 != self.epochs]
        return early_stop([h["epoch"] for h in asked], [h["eigenvalue"] for h in asked])

    def logits_of(self, epoch: int) -> dict[str, Tensor]:
        """Returns the logits that were kept after a measured epoch."""
        return self.kept[epoch // self.config.eigenvalue_every]

    def extra_state(self) -> dict[str, Any]:
        """Returns what a checkpoint holds of it."""
        return {KEPT_LOGITS: self.kept} if self.may_stop else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to the state of a checkpoint.

        Raises:
            ValueError: it lacks an eigenvalue, or the logits of an epoch.
        """
        due = [h for h in state["history"] if self.is_due(h["epoch"])]
        for figures in due:
            value = figures.get("eigenvalue")
            if type(value) is not float or not math.isfinite(value):
                raise ValueError(f"eigenvalue of epoch {figures['epoch']} is {value!r}")
        if not self.may_stop:
            return
        kept = [dict(logits) for logits in state[KEPT_LOGITS]]
        if len(kept) != len(due):
            raise ValueError(f"kept_logits are those of {len(kept)} epochs, not of {len(due)}")
        if not all(bool(t.isfinite().all()) for logits in kept for t in logits.values()):
            raise ValueError("kept_logits are not finite")
        self.kept = kept

    def _measure(self, searcher: Searcher) -> Eigenvalue:
        network, arch = searcher.network, searcher.arch
        logits = list(arch.parameters())
        decay = self.config.arch_weight_decay
        with _left_as_it_was(network, searcher.device), frozen(list(network.parameters())):
            generator = torch.default_generator.manual_seed(_seed_of(searcher))
            images, labels = self._batch(searcher, generator)
            # Not `forward_weights`: those may be drawn, and the Hessian of a draw is another one.
            weights = searcher.validation_weights()
            out = network(images, weights, network.draw(images.device))
            product = hessian_products(F.cross_entropy(out, labels), logits)
            size = sum(t.numel() for t in logits)
            return dominant_eigenvalue(lambda v: product(v) + decay * v, size)

    def _batch(self, searcher: Searcher, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        pipeline, index = searcher.pipeline, searcher.valid_index
        drawn = torch.randperm(len(index), generator=generator)[: self.images]
        chosen, pixels = next(pipeline.images.plain(index[drawn.to(index.device)], self.images))
        batch = pipeline.laid_out(pipeline.images.normalise(pixels))
        return batch, pipeline.images.train_labels[chosen]


def _seed_of(searcher: Searcher) -> int:
    """Returns a seed for the epoch under way, so that each has other images and other noise."""
    return (searcher.config.seed * 1_000_003 + searcher.epoch) % 2**63


@contextmanager
def _left_as_it_was(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Puts running statistics and the state of the global generators back."""
    buffers = list(network.buffers())
    saved = [b.detach().clone() for b in buffers]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, saved):
                buffer.copy_(value)
