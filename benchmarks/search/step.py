"""The first-order search step on random images: eager in four ways, and fastnas."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch.utils.checkpoint import checkpoint

from fastnas import accelerate, nn, reference
from fastnas.benchmarks.harness.memory import peak_bytes, peak_rss_of, saved_bytes
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
    not_run,
)
from fastnas.search.bilevel import Batch, Bilevel
from fastnas.spaces import get_space
from fastnas.strategies import DARTS

BEST = "eager-best"
COMPILE = "compile"
REPEATS = {"cpu": 3, "cuda": 30}
# A ReLU or max-pooling whose inputs round to the other side moves a gradient by far more than eps:
# over the default network torch's own two layouts are 2.5e-3 of the norm apart.
ROUNDING = 1e-2
RSS_STEPS = 1
VERIFIED_BATCH = 8
# Shapes, batches and who needs a gradient: a mixed op is compiled for each combination.
RECOMPILATIONS = 128


@dataclass(frozen=True)
class Size:
    C: int
    layers: int
    batch: int
    pixels: int = 32
    classes: int = 10
    space: str = "S0"

    @property
    def name(self) -> str:
        return f"{self.space} C{self.C} L{self.layers}"

    @property
    def op(self) -> str:
        return f"search_step {self.name}"

    @property
    def shape(self) -> str:
        return f"{self.batch}x3x{self.pixels}x{self.pixels}"


SIZES = {"default": Size(C=16, layers=8, batch=64), "quick": Size(C=8, layers=4, batch=32)}


class _Checkpointed(reference.Cell):
    def forward(self, s0: Tensor, s1: Tensor, w: Tensor) -> Tensor:
        return checkpoint(super().forward, s0, s1, w, use_reentrant=False)


class CheckpointedNetwork(reference.SearchNetwork):
    """The eager network, every cell computed again in backward."""

    cell = _Checkpointed


class DrawlessNetwork(reference.SearchNetwork):
    """The eager network for `Bilevel`, which hands the noise of a pass to it: here none."""

    def draw(self, device: torch.device | None = None) -> None:
        return None

    def forward(self, x: Tensor, weights: reference.Weights, draw: None = None) -> Tensor:
        return super().forward(x, weights)


@cache
def _compiled_mixed_op() -> Callable[..., Tensor]:
    return torch.compile(reference.MixedOp.forward, fullgraph=True, dynamic=False)


class _CompiledOp(reference.MixedOp):
    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return _compiled_mixed_op()(self, x, w)


class _CompiledCell(reference.Cell):
    mixed_op = _CompiledOp


class CompiledNetwork(DrawlessNetwork):
    """The eager network, every mixed op compiled, once for all of one shape.

    A whole cell takes 4 to 9 minutes to compile on two cores; a step has 8, in two variants.
    """

    cell = _CompiledCell


def accelerated(*arguments: Any) -> reference.SearchNetwork:
    """The eager network, run by `fastnas.accelerate`."""
    network = reference.SearchNetwork(*arguments)
    accelerate(network)
    return network


@dataclass(frozen=True)
class Provider:
    """Network and layout; `pruned` steps form only the gradients that they use."""

    network: Callable[..., reference.SearchNetwork]
    pruned: bool
    layout: str = "contiguous"
    reported_as: str = ""
    """The name under which only the fastest of a group is reported."""
    quick: bool = True
    """Whether it belongs to quick runs."""


PROVIDERS: Mapping[str, Provider] = {
    EAGER: Provider(reference.SearchNetwork, pruned=False),
    "eager-pruned": Provider(DrawlessNetwork, pruned=True, reported_as=BEST),
    "eager-pruned-channels-last": Provider(
        DrawlessNetwork, pruned=True, layout="channels_last", reported_as=BEST
    ),
    "checkpoint": Provider(CheckpointedNetwork, pruned=False),
    COMPILE: Provider(CompiledNetwork, pruned=True, layout="channels_last", quick=False),
    "fastnas": Provider(nn.SearchNetwork, pruned=True),
    "fastnas-fast": Provider(partial(nn.SearchNetwork, memory="fast"), pruned=True),
    "fastnas-minimal": Provider(partial(nn.SearchNetwork, memory="minimal"), pruned=True),
    "fastnas-accelerated": Provider(accelerated, pruned=False),
}


@dataclass
class Setup:
    """One provider's own copy of the search: the same weights, logits and images for all."""

    network: reference.SearchNetwork
    arch: nn.ArchParameters
    params_optimizer: torch.optim.Optimizer
    arch_optimizer: torch.optim.Optimizer
    train: Batch
    valid: Batch
    step: Callable[[], object] = field(init=False)

    def inputs(self) -> list[Tensor]:
        """What is there before a step, and is not saved by it."""
        held = [*self.network.parameters(), *self.network.buffers(), *self.arch.parameters()]
        return [*held, *self.train, *self.valid]

    def gradients(self) -> Outputs:
        """Of the one step that was made, as the optimizers' first moments hold them."""
        dalpha = [self.arch_optimizer.state[p]["exp_avg"] for p in self.arch.parameters()]
        dparams = [
            self.params_optimizer.state[p]["momentum_buffer"] for p in self.network.parameters()
        ]
        return {
            "dalpha": torch.cat([g.reshape(-1) for g in dalpha]),
            "dparams": torch.cat([g.reshape(-1) for g in dparams]),
        }


def build(name: str, size: Size, device: str, dtype: torch.dtype = torch.float32) -> Setup:
    """The search of a provider, from the same seed on every call."""
    provider, space = PROVIDERS[name], get_space(size.space)
    generator = torch.Generator().manual_seed(SEED)
    layout = torch.channels_last if provider.layout == "channels_last" else torch.contiguous_format

    def batch() -> Batch:
        images = torch.randn(size.batch, 3, size.pixels, size.pixels, generator=generator)
        labels = torch.randint(size.classes, (size.batch,), generator=generator)
        return images.to(device, dtype).to(memory_format=layout), labels.to(device)

    torch.manual_seed(SEED)
    network = provider.network(space, size.C, size.classes, size.layers)
    network = network.to(device, dtype).to(memory_format=layout).train()
    arch = nn.ArchParameters(space, scale=0.1).to(device, dtype)
    params_optimizer = torch.optim.SGD(
        network.parameters(), lr=0.025, momentum=0.9, weight_decay=3e-4
    )
    arch_optimizer = torch.optim.Adam(
        arch.parameters(), lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3
    )
    setup = Setup(network, arch, params_optimizer, arch_optimizer, batch(), batch())
    setup.step = _pruned_step(setup) if provider.pruned else _public_step(setup)
    return setup


def _public_step(setup: Setup) -> Callable[[], object]:
    return lambda: reference.search_step(
        setup.network,
        setup.arch.alphas(),
        setup.params_optimizer,
        setup.arch_optimizer,
        setup.train,
        setup.valid,
    )


def _pruned_step(setup: Setup) -> Callable[[], object]:
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


def verify_steps(size: Size, device: str, providers: Iterable[str]) -> dict[str, str]:
    """Provider to "yes", "no: how" or "not run: why": a step's gradients against eager's in fp64.

    On a few images: the convolutions of fp64 are slow on a CPU.
    """
    size = replace(size, batch=min(size.batch, VERIFIED_BATCH))

    def outputs(name: str, dtype: torch.dtype = torch.float32) -> Outputs:
        setup = build(name, size, device, dtype)
        setup.step()
        return setup.gradients()

    exact = {
        name: Exact(value, ROUNDING * float(torch.linalg.vector_norm(value)), by_norm=True)
        for name, value in outputs(EAGER, torch.float64).items()
    }
    eager = errors(outputs(EAGER), exact)
    verdicts = {}
    for name in providers:
        try:
            allowed = dict.fromkeys(exact, 0.0) if name == EAGER else eager
            reason = disagreement(outputs(name), exact, allowed)
        except Exception as error:
            if name == COMPILE:
                verdicts[name] = not_run(error)
                continue
            reason = first_line(error)
        verdicts[name] = YES if reason is None else f"no: {reason}"
    return verdicts


def search_rows(
    conditions: Conditions,
    device: str,
    quick: bool,
    say: Callable[[str], object],
    skip: Collection[str] = (),
) -> Iterator[Row]:
    """Verify, time and weigh the step of every provider; `say` hears what is going on."""
    size_name = "quick" if quick else "default"
    size = SIZES[size_name]
    names = [n for n, p in PROVIDERS.items() if (p.quick or not quick) and n not in skip]
    with _cudnn_benchmark(), dynamo_config.patch(recompile_limit=RECOMPILATIONS):
        say(f"{size.op}: verifying")
        verdicts = verify_steps(size, device, names)
        setups = {name: build(name, size, device) for name in names if verdicts[name] == YES}
        say(f"{size.op}: timing")
        timings = measure(
            {name: setup.step for name, setup in setups.items()},
            repeats=3 if quick else REPEATS[device],
            warmup=1,
            device=device,
        )
        for name in reported(names, {name: t.median_ms for name, t in timings.items()}):
            provider = PROVIDERS[name]
            say(f"{size.op}: memory of {name}")
            verified, weights = verdicts[name] == YES, {}
            if verified:
                setup = setups[name]
                weights["saved_bytes"] = saved_bytes(setup.step, exclude=setup.inputs())
                if device != "cpu":
                    weights["peak_bytes"] = peak_bytes(setup.step, device)
                elif name != COMPILE:  # the compiler's own memory would count
                    weights["peak_bytes"] = _rss_growth(name, size_name)
            yield new_row(
                conditions,
                suite="search",
                op=size.op,
                backend=provider.reported_as or name,
                pass_="step",
                dtype="float32",
                shape=size.shape,
                K=get_space(size.space).num_candidates("normal"),
                layout=provider.layout,
                verified=verdicts[name],
                timing=timings.get(name),
                **weights,
            )


def reported(names: Iterable[str], medians: Mapping[str, float]) -> list[str]:
    """The providers that get a row: of those reported under one name the fastest that is right."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(PROVIDERS[name].reported_as or name, []).append(name)
    return [min(group, key=lambda n: medians.get(n, float("inf"))) for group in groups.values()]


def _rss_growth(provider: str, size_name: str) -> int:
    """Peak resident bytes that the steps add to a process that has built everything."""

    def peak(steps: int) -> int:
        module = "fastnas.benchmarks.search.step"
        options = ["--size", size_name, "--threads", str(torch.get_num_threads())]
        return peak_rss_of(
            [sys.executable, "-m", module, provider, *options, "--steps", str(steps)]
        )

    return peak(RSS_STEPS) - peak(0)


@contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    """cuDNN picks its algorithms by timing, as in the public DARTS code."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def main() -> None:
    """Makes steps and exits: the process whose memory is measured."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("provider", choices=PROVIDERS)
    parser.add_argument("--size", choices=SIZES, default="default")
    parser.add_argument("--steps", type=int, default=RSS_STEPS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setup = build(arguments.provider, SIZES[arguments.size], "cpu")
    for _ in range(arguments.steps):
        setup.step()


if __name__ == "__main__":
    main()
