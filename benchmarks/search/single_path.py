"""The step of single-path searches: GDAS as its public code writes it, and fastnas.

"eager" is GDAS with one sync per edge; "eager-rome" runs ROME's two edges a node in the same way.
Every step draws afresh, so the medians are over samples as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnas import nn, reference
from fastnas.benchmarks.harness.memory import peak_bytes, saved_bytes
from fastnas.benchmarks.harness.schema import Conditions, Row, new_row
from fastnas.benchmarks.harness.timing import measure
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
from fastnas.search.bilevel import Batch, Bilevel
from fastnas.spaces import CELL_TYPES, get_space
from fastnas.strategies import get_strategy
from fastnas.strategies.single_path import SinglePath

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
    """A method with its options, eager or fused."""

    method: str
    eager: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def strategy(self) -> SinglePath:
        strategy = get_strategy(self.method, **self.options)
        assert isinstance(strategy, SinglePath)
        return strategy

    def network(self, size: Size) -> reference.SearchNetwork:
        strategy = self.strategy()
        kind = strategy.eager_network if self.eager else nn.SearchNetwork
        torch.manual_seed(SEED)
        return kind(strategy.space(get_space(size.space)), size.C, size.classes, size.layers)


PROVIDERS: Mapping[str, Provider] = {
    EAGER: Provider("gdas", eager=True),
    "eager-rome": Provider("rome", eager=True, options={"samples": 1}),
    "fastnas-gdas": Provider("gdas"),
    "fastnas-rome": Provider("rome", options={"samples": 1}),
    "fastnas-rome-7": Provider("rome", options={"samples": 7}),
    "fastnas-rome-7-at-once": Provider("rome", options={"samples": 7, "paths_at_once": True}),
}


def single_path_rows(conditions: Conditions, device: str, quick: bool, say: Say) -> Iterator[Row]:
    """Verify, time and weigh the step of every provider."""
    size = SIZES["quick" if quick else "default"]
    case = f"single_path_step {size.name}"
    verdicts: dict[str, str] = {}
    steps: dict[str, Callable[[], None]] = {}
    held: dict[str, list[Tensor]] = {}
    for name in PROVIDERS:
        say(f"{case}: verifying {name}")
        verdicts[name] = verdict(name, size, device)
        if verdicts[name] == YES:
            steps[name], held[name] = build(name, size, device)
    say(f"{case}: timing")
    repeats = QUICK_REPEATS if quick else REPEATS
    timings = measure(steps, repeats=repeats, warmup=1, device=device, drain=True)
    for name, word in verdicts.items():
        say(f"{case}: memory of {name}")
        found: dict[str, Any] = {}
        samples = PROVIDERS[name].strategy().samples
        if name in steps:
            found["saved_bytes"] = saved_bytes(steps[name], exclude=held[name])
            if device == "cuda":
                found["peak_bytes"] = peak_bytes(steps[name], device)
        yield new_row(
            conditions,
            suite="paths",
            op=case if samples == 1 else f"{case}, {samples} samples",
            backend=name,
            pass_="step",
            dtype="float32",
            shape=size.shape,
            K=get_space(size.space).num_candidates("normal"),
            layout="contiguous",
            verified=word,
            timing=timings.get(name),
            **found,
        )


def build(name: str, size: Size, device: str) -> tuple[Callable[[], None], list[Tensor]]:
    """A step of a provider's own search, and what is there before it and is not saved by it."""
    provider = PROVIDERS[name]
    strategy, network = provider.strategy(), provider.network(size).to(device).train()
    arch = nn.ArchParameters(network.space, 1e-3, strategy.topology).to(device)
    optimizers = (
        torch.optim.SGD(network.parameters(), lr=0.025, momentum=0.9, weight_decay=3e-4),
        torch.optim.Adam(arch.parameters(), lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3),
    )
    train, valid = _batch(size, device), _batch(size, device)
    held = [*network.parameters(), *network.buffers(), *arch.parameters(), *train, *valid]
    if provider.eager:
        return lambda: strategy.eager_step(network, arch, optimizers, train, valid), held
    assert isinstance(network, nn.SearchNetwork)
    bilevel = Bilevel(network, arch, strategy, *optimizers)

    def step() -> None:
        bilevel.arch_step(valid, train)
        bilevel.weight_step(train)

    return step, held


def _batch(size: Size, device: str) -> Batch:
    images = torch.randn(size.batch, 3, size.pixels, size.pixels)
    return images.to(device), torch.randint(size.classes, (size.batch,)).to(device)


def verdict(name: str, size: Size, device: str) -> str:
    """ "yes", or how a pass differs from eager single paths in fp64 on the same samples."""
    if device == "cpu":
        size = replace(size, batch=VERIFIED_BATCH)
    provider = PROVIDERS[name]
    try:
        wide = _results(replace(provider, eager=True), size, device, wide=True)
        exact = {
            what: Exact(
                value, ROUNDING[what] * float(torch.linalg.vector_norm(value)), by_norm=True
            )
            for what, value in wide.items()
        }
        eager = _results(replace(provider, eager=True), size, device)
        got = eager if provider.eager else _results(provider, size, device)
    except Exception as error:
        return f"no: {first_line(error)}"
    off = dict.fromkeys(exact, 0.0) if provider.eager else errors(eager, exact)
    reason = disagreement(got, exact, off)
    return YES if reason is None else f"no: {reason}"


def _results(provider: Provider, size: Size, device: str, wide: bool = False) -> Outputs:
    """A pass with all samples and the gradients of its loss, from the same seed on every call."""
    dtype = torch.float64 if wide else torch.float32
    strategy, network = provider.strategy(), provider.network(size).to(device, dtype).train()
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
    found = torch.autograd.grad(loss, [*arch.parameters(), *params], allow_unused=True)
    count = len(found) - len(params)

    def flat(gradients: tuple[Tensor | None, ...]) -> Tensor:
        return torch.cat([g.reshape(-1).double() for g in gradients if g is not None])

    return {
        "logits": logits.detach().double(),
        "dalpha": flat(found[:count]),
        "dparams": flat(found[count:]),
    }
