"""Measures what one training forward saves: supernets, eager and fused, and single paths.

Single-path methods trade the gradient of the supernet for memory. Here each runs its sampled
operations with weight 1 and nothing else, which is the least that it can hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from statistics import mean

import torch
from torch import Tensor

from fastnas import nn, reference
from fastnas.benchmarks.harness.memory import saved_bytes
from fastnas.benchmarks.harness.schema import Conditions, Row, new_row
from fastnas.benchmarks.harness.verify import EAGER, SEED, YES, first_line
from fastnas.benchmarks.search.providers import SIZES, Size
from fastnas.spaces import CELL_TYPES, CellType, Space, get_space

PASS = "saved"
SAMPLES = 20
QUICK_SAMPLES = 3
VERIFIED_BATCH = 2
TOLERANCE = 1e-9

Sampler = Callable[[Space, CellType, torch.Generator], Tensor]
"""Mixing weights [E, K] of a cell type."""


class _SinglePathCell(reference.Cell):
    """Runs the operations whose weight is 1; the others and their edges do not exist."""

    def forward(self, s0: Tensor, s1: Tensor, w: Tensor) -> Tensor:
        sampled = dict(w.nonzero().tolist())
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for node in range(self.nodes):
            first, *rest = (
                self._ops[e]._ops[sampled[e]](x)
                for e, x in zip(self.edges_into(node), states)
                if e in sampled
            )
            # `sum` begins with the first term, not with 0: that would be one tensor more.
            states.append(sum(rest, first))
        return torch.cat(states[2:], dim=1)


class SinglePathNetwork(reference.SearchNetwork):
    """Runs the eager network on the operations that one-hot mixing weights choose."""

    cell = _SinglePathCell


def mixture(space: Space, cell_type: CellType, generator: torch.Generator) -> Tensor:
    """Mixes as DARTS: every candidate of every edge, with gradients for the weights."""
    shape = len(space.edges), space.num_candidates(cell_type)
    return torch.softmax(torch.randn(shape, generator=generator), -1).requires_grad_()


def gdas(space: Space, cell_type: CellType, generator: torch.Generator) -> Tensor:
    """Picks one of all candidates on every edge, as GDAS (1910.04465)."""
    w = torch.zeros(len(space.edges), space.num_candidates(cell_type))
    choice = torch.randint(w.shape[1], (len(w),), generator=generator)
    w[torch.arange(len(w)), choice] = 1
    return w


def rome(space: Space, cell_type: CellType, generator: torch.Generator) -> Tensor:
    """Picks two edges into every node, one candidate but `none` on each, as ROME (2011.11233)."""
    w = torch.zeros(len(space.edges), space.num_candidates(cell_type))
    first = 0
    for node in range(space.nodes):
        inputs = 2 + node
        for e in torch.randperm(inputs, generator=generator)[:2].tolist():
            names = space.candidates(cell_type)[first + e]
            # ROME samples no edge's `none`: that an edge is absent is said by its topology.
            live = [k for k, name in enumerate(names) if name != "none"]
            w[first + e, live[int(torch.randint(len(live), (), generator=generator))]] = 1
        first += inputs
    return w


PROVIDERS: Mapping[str, tuple[Callable[..., reference.SearchNetwork], Sampler]] = {
    EAGER: (reference.SearchNetwork, mixture),
    "fastnas": (nn.SearchNetwork, mixture),
    "fastnas-fast": (partial(nn.SearchNetwork, memory="fast"), mixture),
    "fastnas-minimal": (partial(nn.SearchNetwork, memory="minimal"), mixture),
    "gdas": (SinglePathNetwork, gdas),
    "rome": (SinglePathNetwork, rome),
}


def memory_rows(
    conditions: Conditions, device: str, quick: bool, say: Callable[[str], object]
) -> Iterator[Row]:
    """Verifies every provider and weighs its forward; of single paths the mean over samples."""
    size = SIZES["quick" if quick else "default"]
    for name, (_, sampler) in PROVIDERS.items():
        say(f"forward {size.name}: memory of {name}")
        verified, saved = _verdict(name, size, device), None
        if verified == YES:
            # A mixture always runs everything, so one pass tells; what single paths save depends on
            # the sample.
            samples = 1 if sampler is mixture else QUICK_SAMPLES if quick else SAMPLES
            saved = round(mean(_saved(name, size, device, samples)))
        yield new_row(
            conditions,
            suite="memory",
            op=f"forward {size.name}",
            backend=name,
            pass_=PASS,
            dtype="float32",
            shape=size.shape,
            K=get_space(size.space).num_candidates("normal"),
            layout="contiguous",
            verified=verified,
            saved_bytes=saved,
        )


def _network(
    build: Callable[..., reference.SearchNetwork], size: Size, device: str
) -> reference.SearchNetwork:
    torch.manual_seed(SEED)
    network = build(get_space(size.space), size.C, size.classes, size.layers)
    return network.to(device).train()


def _images(size: Size, device: str) -> Tensor:
    torch.manual_seed(SEED)
    return torch.randn(size.batch, 3, size.pixels, size.pixels).to(device)


def _weights(sampler: Sampler, size: Size, device: str, seed: int) -> dict[str, Tensor]:
    """Draws one sample for each cell type, shared by all cells of the type."""
    generator, space = torch.Generator().manual_seed(seed), get_space(size.space)
    return {t: sampler(space, t, generator).to(device) for t in CELL_TYPES}


def _saved(name: str, size: Size, device: str, samples: int) -> Iterator[int]:
    """Returns each sample's bytes, without parameters, buffers and images that are there anyway."""
    build, sampler = PROVIDERS[name]
    network, images = _network(build, size, device), _images(size, device)
    # They are there before the pass, so it does not save them.
    held = [*network.parameters(), *network.buffers(), images]
    for seed in range(samples):
        weights = _weights(sampler, size, device, seed)
        yield saved_bytes(partial(network, images, weights), exclude=held)


def _verdict(name: str, size: Size, device: str) -> str:
    """Returns "yes", or how the logits differ from eager's on the same weights, in fp64."""
    # fp64 is slow, and the mathematics does not depend on the size of the batch.
    size = replace(size, batch=VERIFIED_BATCH)
    build, sampler = PROVIDERS[name]
    images = _images(size, device).double()
    weights = {t: w.double() for t, w in _weights(sampler, size, device, SEED).items()}
    try:
        got, right = (
            _network(b, size, device).double()(images, weights).detach()
            for b in (build, reference.SearchNetwork)
        )
    except Exception as error:
        return f"no: {first_line(error)}"
    error, allowed = float((got - right).abs().max()), TOLERANCE * float(right.abs().max())
    return YES if error <= allowed else f"no: logits are off by {error:.2g}, not {allowed:.2g}"
