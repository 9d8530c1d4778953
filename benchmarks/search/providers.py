"""Makes the search step: eager in its variants, torch.compile, and fastnas."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastnas import accelerate, nn, reference
from fastnas.benchmarks.harness.limits import BATCHES, COMPILE_SECONDS
from fastnas.benchmarks.harness.verify import EAGER
from fastnas.checks import short

BEST = "eager-best"
GRAPH = "-graph"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
    """Runs the eager network, every cell computed again in backward."""

    cell = _Checkpointed


class DrawlessNetwork(reference.SearchNetwork):
    """Runs the eager network in `Bilevel`, as a network that draws no noise.

    `Bilevel` hands it the noise of a pass and asks what kernels have sampled: here none.
    """

    def draw(self, device: torch.device | None = None) -> None:
        return None

    def on_device(self, passes: Sequence[object]) -> list[tuple[list[Tensor], Tensor]]:
        return []

    def forward(self, x: Tensor, weights: reference.Weights, draw: None = None) -> Tensor:
        return super().forward(x, weights)


# There is one class for each region and mode: a second would compile everything once more.
@cache
def compiled_network(region: str, mode: str) -> type[DrawlessNetwork]:
    """Compiles every mixed op ("op") or cell ("cell") of the eager network, once for each shape.

    A whole cell takes 4 to 9 minutes to compile on two cores; a step has 8, in two variants.
    """
    forwards: dict[str, Callable[..., Tensor]] = {
        "op": reference.MixedOp.forward,
        "cell": reference.Cell.forward,
    }
    compiled = torch.compile(forwards[region], fullgraph=True, dynamic=False, mode=mode)

    class Op(reference.MixedOp):
        def forward(self, *arguments: Tensor) -> Tensor:
            return compiled(self, *arguments)

    class Cell(reference.Cell):
        mixed_op = Op

    class WholeCell(reference.Cell):
        def forward(self, *arguments: Tensor) -> Tensor:
            return compiled(self, *arguments)

    class Network(DrawlessNetwork):
        cell = Cell if region == "op" else WholeCell

    return Network


def accelerated(*arguments: Any) -> reference.SearchNetwork:
    """Runs the eager network by `fastnas.accelerate`."""
    network = reference.SearchNetwork(*arguments)
    accelerate(network)
    return network


@dataclass(frozen=True)
class Provider:
    """Names network and layout; `pruned` steps form only the gradients that they use."""

    network: Callable[..., reference.SearchNetwork]
    pruned: bool
    layout: str = "contiguous"
    reported_as: str = ""
    """The name under which only the fastest of a group is reported."""
    quick: bool = True
    """Whether it belongs to quick runs."""
    slow: bool = False
    """Whether only `full` runs have it, and those that name it."""
    devices: Collection[str] = ("cpu", "cuda")
    graph: bool = False
    """Whether the whole step is one CUDA graph."""
    compiled: bool = False

    def as_graph(self) -> Provider:
        reported_as = self.reported_as and self.reported_as + GRAPH
        return replace(self, graph=True, devices=("cuda",), reported_as=reported_as)


def _compiled(region: str, mode: str, layout: str, slow: bool) -> Provider:
    return Provider(
        # It is called when a network is built: importing this module must not start torch.compile.
        lambda *arguments: compiled_network(region, mode)(*arguments),
        pruned=True,
        layout=layout,
        quick=False,
        slow=slow,
        compiled=True,
    )


_MAX = "max-autotune-no-cudagraphs"
_IN_ORDER: Mapping[str, Provider] = {
    EAGER: Provider(reference.SearchNetwork, pruned=False),
    "eager-channels-last": Provider(
        reference.SearchNetwork, pruned=False, layout="channels_last", devices=("cuda",)
    ),
    "eager-pruned": Provider(DrawlessNetwork, pruned=True, reported_as=BEST),
    "eager-pruned-channels-last": Provider(
        DrawlessNetwork, pruned=True, layout="channels_last", reported_as=BEST
    ),
    "checkpoint": Provider(CheckpointedNetwork, pruned=False),
    "compile": _compiled("op", "default", "channels_last", slow=False),
    "compile-nchw": _compiled("op", "default", "contiguous", slow=True),
    "compile-cell": _compiled("cell", "default", "channels_last", slow=True),
    "compile-max": _compiled("op", _MAX, "channels_last", slow=True),
    "compile-max-nchw": _compiled("op", _MAX, "contiguous", slow=True),
    "fastnas": Provider(nn.SearchNetwork, pruned=True),
    "fastnas-fast": Provider(partial(nn.SearchNetwork, memory="fast"), pruned=True),
    "fastnas-minimal": Provider(partial(nn.SearchNetwork, memory="minimal"), pruned=True),
    "fastnas-accelerated": Provider(accelerated, pruned=False),
}
# Checkpointing reads the state of the random generator, which a capture does not allow.
_NO_GRAPH = ("checkpoint", "fastnas-accelerated")
PROVIDERS: Mapping[str, Provider] = {
    **_IN_ORDER,
    **{
        name + GRAPH: provider.as_graph()
        for name, provider in _IN_ORDER.items()
        if name not in _NO_GRAPH
    },
}


@dataclass(frozen=True)
class StepSettings:
    """Says which steps are measured, and how.

    Attributes:
        quick: a small network, a small batch, no torch.compile.
        full: also the providers that are slow to prepare.
        skip: providers left out.
        only: providers measured, besides eager; empty: the usual ones of the device.
        batch: images; None: those of the size.
        dtype: of params and activations, "float32" or "bfloat16"; the logits are float32.
        compile_seconds: for all of torch.compile, in processes of its own that fill its cache;
            what is not compiled then gets a row that says so. None: no limit.

    Raises:
        ValueError: naming what is not allowed.
    """

    quick: bool = False
    full: bool = False
    skip: Collection[str] = ()
    only: Collection[str] = ()
    batch: int | None = None
    dtype: str = "float32"
    compile_seconds: float | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.only if name not in PROVIDERS]
        if unknown:
            raise ValueError(f"only has {short(unknown[0])}; allowed: {', '.join(PROVIDERS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}")
        if self.batch is not None:
            BATCHES.check("batch", self.batch)
        if self.compile_seconds is not None:
            COMPILE_SECONDS.check("compile_seconds", self.compile_seconds)

    @property
    def size_name(self) -> str:
        return "quick" if self.quick else "default"

    @property
    def size(self) -> Size:
        size = SIZES[self.size_name]
        return size if self.batch is None else replace(size, batch=self.batch)

    def providers(self, device: str) -> list[str]:
        """Lists names, eager first, then in the order of `only`.

        Raises:
            ValueError: one in `only` cannot run on the device.
        """
        for name in self.only:
            if device not in PROVIDERS[name].devices:
                raise ValueError(f"only has {name!r}, which needs a CUDA device")
        wanted = self.only or [n for n, p in PROVIDERS.items() if self._wants(p, device)]
        return [name for name in dict.fromkeys([EAGER, *wanted]) if name not in self.skip]

    def _wants(self, provider: Provider, device: str) -> bool:
        return (
            device in provider.devices
            and (provider.quick or not self.quick)
            and (self.full or not provider.slow)
        )
