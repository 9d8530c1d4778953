"""What the tests of relu_conv_bn share: inputs, a call and what eager makes of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from cases import laid_out
from edge_cases import EPS, MOMENTUM, Pair, named, updated, with_gradients
from rule import NOTHING, Allowance, Results, agree, nudged, roundings
from torch import Tensor

from fastnas import reference
from fastnas.backends import BACKENDS
from fastnas.backends.layout import state_format
from fastnas.ops import relu_conv_bn


@dataclass(frozen=True, repr=False)
class Inputs:
    """A call of relu_conv_bn and the gradient that comes back; given statistics mean eval."""

    x: Tensor
    params: list[Tensor]
    dy: Tensor
    paths: int = 1
    statistics: Tensor | None = None
    """[2, C] mean and variance."""

    @property
    def training(self) -> bool:
        return self.statistics is None

    @property
    def leaves(self) -> Results:
        return {"x": self.x, **{f"params[{i}]": p for i, p in enumerate(self.params)}}

    def initial_running(self) -> list[Pair]:
        if self.statistics is not None:
            mean, variance = self.statistics.clone()
            return [(mean, variance)]
        wide, C = torch.promote_types(self.x.dtype, torch.float32), self.dy.shape[1]
        return [(torch.full((C,), 0.5, dtype=wide), torch.full((C,), 2.0, dtype=wide))]


def make(
    stride: int,
    size: tuple[int, int] = (5, 7),
    channels: tuple[int, int] = (3, 6),
    N: int = 4,
    dtype: torch.dtype = torch.float64,
    *,
    offset: float = 0.0,
    layout: str = "channels_last",
    dy_layout: str = "channels_last",
    seed: int = 0,
) -> Inputs:
    """Stride 2 has two kernels, each for half of the output channels."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, about: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (about + values).to(dtype)

    into, out = channels
    params = [normal(out // stride, into, 1, 1) for _ in range(stride)]
    rows, cols = (-(-s // stride) for s in size)
    x = laid_out(normal(N, into, *size, about=offset), layout)
    return Inputs(x, params, laid_out(normal(N, out, rows, cols), dy_layout))


def outside_of_training(inputs: Inputs) -> Inputs:
    """The same call with given statistics, which are not those of the batch."""
    generator = torch.Generator().manual_seed(5)
    shape = 2, inputs.dy.shape[1]
    statistics = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
    return replace(
        inputs, statistics=statistics.to(torch.promote_types(inputs.x.dtype, torch.float32))
    )


def run(inputs: Inputs, backend: str, needs: Collection[str] | None = None) -> Results:
    """On the device of the backend; the results are on the CPU."""
    device = getattr(BACKENDS[backend], "device", "cpu")
    mean, variance = (t.to(device) for t in inputs.initial_running()[0])

    def f(leaves: Sequence[Tensor]) -> Tensor:
        x, *params = leaves
        return relu_conv_bn(x, params, running=(mean, variance), momentum=MOMENTUM, eps=EPS,
                            training=inputs.training, paths=inputs.paths,
                            backend=backend)  # fmt: skip

    leaves = {name: t.to(device) for name, t in inputs.leaves.items()}
    results = with_gradients(f, leaves, inputs.dy.to(device), needs) | named([(mean, variance)])
    y = results["y"]
    assert not y.numel() or y.is_contiguous(memory_format=state_format(leaves["x"]))
    return {name: t.cpu() for name, t in results.items()}


def by_eager(inputs: Inputs, dtype: torch.dtype | None = None) -> Results:
    leaves = {name: t.to(dtype or t.dtype) for name, t in inputs.leaves.items()}
    wide = torch.promote_types(leaves["x"].dtype, torch.float32)
    running = inputs.initial_running()

    def f(leaves: Sequence[Tensor]) -> Tensor:
        out = []
        for group in leaves[0].chunk(inputs.paths):
            stats = torch.zeros(2, inputs.dy.shape[1], dtype=wide)
            if inputs.statistics is not None:
                stats = inputs.statistics.to(wide)
            y = reference.relu_conv_bn(group, leaves[1:], stats, training=inputs.training,
                                       eps=EPS)  # fmt: skip
            if inputs.training:
                moved = updated(running, stats[None], y.numel() // y.shape[1])
                running[0] = moved["running[0].mean"], moved["running[0].var"]
            out.append(y)
        return torch.cat(out)

    results = with_gradients(f, leaves, inputs.dy)
    return results | named(running)


def compare(got: Results, inputs: Inputs, allowance: Allowance = NOTHING) -> None:
    exact, eager = by_eager(inputs, torch.float64), by_eager(inputs)
    agree(got, exact, eager, inputs.x.dtype, allowance)


def moved_by_rounding(inputs: Inputs) -> Results:
    """How much the exact results move where all inputs move by `roundings`.

    Or by one in their own dtype, in which y is stored, which backward reads.
    """
    generator, dtype = torch.Generator().manual_seed(0), inputs.x.dtype
    by = max(roundings(dtype), torch.finfo(dtype).eps)
    x, *params, dy = (nudged(t, by, generator) for t in (*inputs.leaves.values(), inputs.dy))
    here = by_eager(inputs, torch.float64)
    there = by_eager(replace(inputs, x=x, params=params, dy=dy))
    return {name: there[name] - t for name, t in here.items()}


def check(inputs: Inputs, backend: str, needs: Collection[str] | None = None) -> Results:
    got = run(inputs, backend, needs)
    compare(got, inputs)
    return got
