"""Builds one provider's own copy of a search: network, logits, optimizers, batches, and step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastnas import nn, reference
from fastnas.benchmarks.harness.graph import captured
from fastnas.benchmarks.harness.verify import SEED, Outputs
from fastnas.benchmarks.search.providers import PROVIDERS, Provider, Size
from fastnas.search.bilevel import Bilevel
from fastnas.spaces import get_space
from fastnas.strategies.darts import DARTS
from fastnas.strategies.steps import Batch


@dataclass
class Setup:
    """Holds one provider's own copy of the search: the same weights, logits and images for all."""

    network: reference.SearchNetwork
    arch: nn.ArchParameters
    params_optimizer: torch.optim.Optimizer
    arch_optimizer: torch.optim.Optimizer
    train: Batch
    valid: Batch
    step: Callable[[], object] = field(init=False)
    graph_peak_bytes: int | None = field(init=False, default=None)
    """What a graph of the step takes while it runs, None where the step is no graph."""

    def inputs(self) -> list[Tensor]:
        """Lists what is there before a step, and is not saved by it."""
        return [*self._searched(), *self.train, *self.valid]

    def gradients(self) -> Outputs:
        """Returns those of the one step made, as the optimizers' first moments hold them."""
        # After one step Adam's first moment is (1 - beta_1) g and SGD's buffer is g, both with the
        # weight decay: each provider's are compared with the exact ones, scaled alike.
        dalpha = [self.arch_optimizer.state[p]["exp_avg"] for p in self.arch.parameters()]
        dparams = [
            self.params_optimizer.state[p]["momentum_buffer"] for p in self.network.parameters()
        ]
        return {
            "dalpha": torch.cat([g.reshape(-1) for g in dalpha]),
            "dparams": torch.cat([g.reshape(-1) for g in dparams]),
        }

    def capture(self) -> None:
        """Makes the step the replay of a CUDA graph; the search is where it was before."""
        # The warm-up makes real steps, which move all of these.
        before = [t.detach().clone() for t in self._searched()]
        self.step, self.graph_peak_bytes = captured(self.step)
        with torch.no_grad():
            for t, value in zip(self._searched(), before):
                t.copy_(value)
            # The captured step has moved them; zero is where a first step begins, and their
            # addresses stay.
            for t in self._moments():
                t.zero_()

    def _searched(self) -> list[Tensor]:
        return [*self.network.parameters(), *self.network.buffers(), *self.arch.parameters()]

    def _moments(self) -> Iterator[Tensor]:
        for optimizer in (self.params_optimizer, self.arch_optimizer):
            for state in optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))


def build(
    name: str,
    size: Size,
    device: str,
    dtype: torch.dtype = torch.float32,
    wide: bool = False,
) -> Setup:
    """Builds a provider's search, from the same seed on every call; not yet captured.

    Args:
        dtype: of params, buffers and images; the logits are float32.
        wide: the same numbers, rounded to `dtype`, in float64.
    """
    provider, space = PROVIDERS[name], get_space(size.space)
    generator = torch.Generator().manual_seed(SEED)
    layout = torch.channels_last if provider.layout == "channels_last" else torch.contiguous_format
    computed = torch.float64 if wide else dtype

    def batch() -> Batch:
        images = torch.randn(size.batch, 3, size.pixels, size.pixels, generator=generator)
        labels = torch.randint(size.classes, (size.batch,), generator=generator)
        # They are rounded to the case's dtype first, so fp64 computes on the very numbers of the
        # case.
        images = images.to(dtype).to(device, computed)
        return images.to(memory_format=layout), labels.to(device)

    torch.manual_seed(SEED)
    network = provider.network(space, size.C, size.classes, size.layers)
    network = network.to(dtype).to(device, computed).train()
    network = network.to(memory_format=layout)  # type: ignore[call-overload]
    arch = nn.ArchParameters(space, scale=0.1)
    # Logits stay in fp32 where the network is bfloat16: steps of 3e-4 would be lost to rounding.
    arch = arch.to(device, torch.promote_types(computed, torch.float32))
    params_optimizer = torch.optim.SGD(
        network.parameters(), lr=0.025, momentum=0.9, weight_decay=3e-4
    )
    arch_optimizer = torch.optim.Adam(
        arch.parameters(), lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3, capturable=provider.graph
    )
    setup = Setup(network, arch, params_optimizer, arch_optimizer, batch(), batch())
    setup.step = _step(setup, provider)
    return setup


def _step(setup: Setup, provider: Provider) -> Callable[[], object]:
    if not provider.pruned:
        return lambda: reference.search_step(
            setup.network,
            setup.arch.alphas(),
            setup.params_optimizer,
            setup.arch_optimizer,
            setup.train,
            setup.valid,
        )
    bilevel = Bilevel(
        setup.network,  # type: ignore[arg-type]
        setup.arch,
        DARTS(),
        setup.params_optimizer,
        setup.arch_optimizer,
    )

    def step() -> None:
        bilevel.arch_step(setup.valid, setup.train)
        bilevel.weight_step(setup.train)

    return step
