"""Measures the step of single-path searches: GDAS as its public code writes it, and fastnas.

"eager" is GDAS with one sync per edge; "eager-rome" runs ROME's two edges a node in the same way.
Every step draws afresh, so the medians are over samples as well. On a GPU each of fastnas' is also
timed as CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnas import nn, reference
from fastnas.benchmarks.harness.memory import peak_bytes, saved_bytes
from fastnas.benchmarks.harness.schema import Conditions, Row, new_row
from fastnas.benchmarks.harness.timing import Timing, measure
from fastnas.benchmarks.harness.verify import (
    EAGER,
    SEED,
    YES,
    Exact,
    Outputs,
    disagreement,
    errors,
    first_line,
)
from fastnas.benchmarks.search.providers import SIZES, Size
from fastnas.benchmarks.search.step import VERIFIED_BATCH
from fastnas.nn import Paths
from fastnas.ops import sample_paths
from fastnas.search.bilevel import Bilevel
from fastnas.search.cuda_graph import CudaRecorder, GraphedBilevel
from fastnas.search.optimizers import adam, capturable_on, sgd
from fastnas.spaces import CELL_TYPES, get_space
from fastnas.strategies import get_strategy
from fastnas.strategies.single_path import SinglePath
from fastnas.strategies.steps import Batch

REPEATS = 9
QUICK_REPEATS = 3
TAU = 5.0
"""Of the verification: near 1 the straight-through gradient vanishes where one logit wins."""
ROUNDING = {"logits": 1e-4, "dalpha": 3e-2, "dparams": 3e-2}
"""In units of the norm, eager's rows too. A relu that rounds to the other side moves the gradient
of one path more than that of a mixture: over 12 samples eager was 1e-5 to 0.9e-2 off, fastnas
0.8e-3 to 2.5e-2; the logits of both by less than 4e-5."""

Say = Callable[[str], object]


@dataclass(frozen=True)
class Provider:
    """Names a method with its options, eager or fused."""

    method: str
    eager: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    graph: bool = False
    """Replayed from CUDA graphs, which serve every sample."""

    def strategy(self) -> SinglePath:
        strategy = get_strategy(self.method, **self.options)
        assert isinstance(strategy, SinglePath)
        return strategy

    def network(self, size: Size) -> reference.SearchNetwork:
        strategy = self.strategy()
        space = strategy.space(get_space(size.space))
        kind = strategy.eager_networks[space.layout] if self.eager else nn.SearchNetwork
        torch.manual_seed(SEED)
        return kind(space, size.C, size.classes, size.layers)


PROVIDERS: Mapping[str, Provider] = {
    EAGER: Provider("gdas", eager=True),
    "eager-rome": Provider("rome", eager=True, options={"samples": 1}),
    "fastnas-gdas": Provider("gdas"),
    "fastnas-rome": Provider("rome", options={"samples": 1}),
    "fastnas-rome-7": Provider("rome", options={"samples": 7}),
    "fastnas-rome-7-at-once": Provider("rome", options={"samples": 7, "paths_at_once": True}),
}
GRAPHS: Mapping[str, Provider] = {
    f"{name}-graph": replace(provider, graph=True)
    for name, provider in PROVIDERS.items()
    if not provider.eager
}
STEPS = 3
"""Whose sum is compared with the steps that a graph was captured from; the first captures."""


def providers(device: str) -> Mapping[str, Provider]:
    return {**PROVIDERS, **(GRAPHS if device == "cuda" else {})}


class Search(NamedTuple):
    """Holds a provider's own copy of a search, and its step."""

    network: reference.SearchNetwork
    arch: nn.ArchParameters
    batches: tuple[Batch, Batch]
    bilevel: Bilevel | GraphedBilevel | None
    step: Callable[[], object]

    def inputs(self) -> list[Tensor]:
        """Lists what is there before a step, and is not saved by it."""
        tensors = [*self.network.parameters(), *self.network.buffers(), *self.arch.parameters()]
        return [*tensors, *(t for batch in self.batches for t in batch)]


def single_path_rows(conditions: Conditions, device: str, quick: bool, say: Say) -> Iterator[Row]:
    """Verifies, times and weighs the step of every provider.

    As in `search_rows`, a provider has a row as soon as it is verified, which another replaces.
    """
    size = SIZES["quick" if quick else "default"]
    case = f"single_path_step {size.name}"
    verdicts: dict[str, str] = {}
    searches: dict[str, Search] = {}

    def row(name: str, timing: Timing | None, **weights: Any) -> Row:
        samples = providers(device)[name].strategy().samples
        return new_row(
            conditions,
            suite="paths",
            op=case if samples == 1 else f"{case}, {samples} samples",
            backend=name,
            pass_="step",
            dtype="float32",
            shape=size.shape,
            K=get_space(size.space).num_candidates("normal"),
            layout="contiguous",
            verified=verdicts[name],
            timing=timing,
            **weights,
        )

    for name, provider in providers(device).items():
        say(f"{case}: verifying {name}")
        verdicts[name] = verdict(provider, size, device)
        if verdicts[name] == YES:
            searches[name] = build(provider, size, device)
        own = {name: searches[name].step} if name in searches else {}
        alone = measure(own, repeats=QUICK_REPEATS, warmup=1, device=device, drain=True)
        yield row(name, alone.get(name))
    steps = {name: search.step for name, search in searches.items()}
    say(f"{case}: timing")
    repeats = QUICK_REPEATS if quick else REPEATS
    timings = measure(steps, repeats=repeats, warmup=1, device=device, drain=True)
    for name in verdicts:
        say(f"{case}: memory of {name}")
        yield row(name, timings.get(name), **_weights(name, searches, device))


def _weights(name: str, searches: Mapping[str, Search], device: str) -> dict[str, int | None]:
    """Returns saved_bytes and peak_bytes; in a graph nothing can be seen from outside."""
    if name not in searches or providers(device)[name].graph:
        return {}
    search = searches[name]
    found: dict[str, int | None] = {"saved_bytes": saved_bytes(search.step, search.inputs())}
    if device == "cuda":
        found["peak_bytes"] = peak_bytes(search.step, device)
    return found


def build(provider: Provider, size: Size, device: str) -> Search:
    """Builds the search from the same seed on every call."""
    strategy, network = provider.strategy(), provider.network(size).to(device).train()
    arch = nn.ArchParameters(network.space, 1e-3, strategy.topology).to(device)
    capturable = provider.graph or (not provider.eager and capturable_on(torch.device(device)))
    params_optimizer = sgd(
        network.parameters(), lr=0.025, capturable=capturable, momentum=0.9, weight_decay=3e-4
    )
    arch_optimizer = adam(
        arch.parameters(), lr=3e-4, capturable=capturable, betas=(0.5, 0.999), weight_decay=1e-3
    )
    train, valid = _batch(size, device), _batch(size, device)
    if provider.eager:
        optimizers = params_optimizer, arch_optimizer
        return Search(
            network, arch, (train, valid), None,
            lambda: strategy.eager_step(network, arch, optimizers, train, valid),
        )  # fmt: skip
    assert isinstance(network, nn.SearchNetwork)
    bilevel: Bilevel | GraphedBilevel
    bilevel = Bilevel(network, arch, strategy, params_optimizer, arch_optimizer)
    if provider.graph:
        bilevel = GraphedBilevel(bilevel, CudaRecorder(torch.device(device)))

    def step() -> None:
        bilevel.arch_step(valid, train)
        bilevel.weight_step(train)

    return Search(network, arch, (train, valid), bilevel, step)


def _batch(size: Size, device: str) -> Batch:
    images = torch.randn(size.batch, 3, size.pixels, size.pixels)
    return images.to(device), torch.randint(size.classes, (size.batch,)).to(device)


def verdict(provider: Provider, size: Size, device: str) -> str:
    """Returns "yes", or how a pass differs from eager single paths in fp64 on the same samples.

    A graph's steps are compared with the same steps as a stream.
    """
    # fp64 convolutions are slow there.
    if device == "cpu":
        size = replace(size, batch=VERIFIED_BATCH)
    try:
        if provider.graph:
            return _verdict_of_graph(provider, size, device)
        # The exact results are those of eager single paths in fp64, on the samples of this
        # provider.
        wide = _results(replace(provider, eager=True), size, device, wide=True)
        exact = _within_rounding(wide)
        eager = _results(replace(provider, eager=True), size, device)
        got = eager if provider.eager else _results(provider, size, device)
    except Exception as error:
        return f"no: {first_line(error)}"
    # Eager itself is held to the stated rounding alone.
    off = dict.fromkeys(exact, 0.0) if provider.eager else errors(eager, exact)
    reason = disagreement(got, exact, off)
    return YES if reason is None else f"no: {reason}"


def _verdict_of_graph(provider: Provider, size: Size, device: str) -> str:
    expected, _ = _moved(replace(provider, graph=False), size, device)
    got, failure = _moved(provider, size, device)
    if failure is not None:
        return f"not run: {failure}"
    reason = disagreement(got, _within_rounding(expected), dict.fromkeys(expected, 0.0))
    return YES if reason is None else f"no: {reason}"


def _moved(provider: Provider, size: Size, device: str) -> tuple[Outputs, str | None]:
    """Lists what some steps change, and why a graph of them was none."""
    search = build(provider, size, device)
    parts = {"dalpha": search.arch.parameters, "dparams": search.network.parameters}
    before = {name: _flat(part()).clone() for name, part in parts.items()}
    # The steps draw samples from here on, so both runs walk the same paths.
    torch.manual_seed(SEED)
    for _ in range(STEPS):
        search.step()
    moved = {name: _flat(part()) - before[name] for name, part in parts.items()}
    return moved, getattr(search.bilevel, "failure", None)


def _within_rounding(right: Outputs) -> dict[str, Exact]:
    return {
        what: Exact(value, ROUNDING[what] * float(torch.linalg.vector_norm(value)), by_norm=True)
        for what, value in right.items()
    }


def _flat(tensors: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([t.detach().reshape(-1).double() for t in tensors if t is not None])


def _results(provider: Provider, size: Size, device: str, wide: bool = False) -> Outputs:
    """Runs a pass with all samples and its loss's gradients, from the same seed on every call."""
    dtype = torch.float64 if wide else torch.float32
    strategy, network = provider.strategy(), provider.network(size).to(device, dtype).train()
    # The logits are far from each other, so that a gradient to the wrong candidate shows.
    arch = nn.ArchParameters(network.space, 0.5, strategy.topology).to(device)
    torch.manual_seed(SEED)
    images, labels = _batch(size, device)
    alpha, beta = (
        torch.stack(list(some.values())) if some else None for some in (arch.alphas(), arch.betas())
    )
    assert alpha is not None
    op, weight = sample_paths(
        alpha, beta, nodes=arch.nodes, tau=TAU, topology=strategy.topology, paths=strategy.samples
    )
    images, weight = images.to(dtype), weight.to(dtype)
    if provider.eager:
        # -1 stands for no edge; its weight is 0, so the column it gets does not matter.
        h = F.one_hot(op.clamp(min=0), alpha.shape[-1]) * weight[..., None]
        logits = torch.stack([
            network(images, {
                cell: reference.HardWeights(h[k, i], op[k, i])
                for i, cell in enumerate(CELL_TYPES)
            })
            for k in range(strategy.samples)
        ])  # fmt: skip
    else:
        paths = {cell: Paths(op[:, i], weight[:, i]) for i, cell in enumerate(CELL_TYPES)}
        logits = network(images, paths)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(strategy.samples))
    params = list(network.parameters())
    # A candidate that no sample runs has no gradient, and is left out on both sides.
    found = torch.autograd.grad(loss, [*arch.parameters(), *params], allow_unused=True)
    count = len(found) - len(params)

    return {
        "logits": logits.detach().double(),
        "dalpha": _flat(found[:count]),
        "dparams": _flat(found[count:]),
    }
