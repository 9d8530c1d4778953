"""Tables and inputs that the tests of mixed_edges share; the rule is that of rule.py, by norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from cases import bits, laid_out, own_memory
from rule import NOTHING, Allowance, Results, agree, nudged, roundings
from targets import Target
from torch import Tensor

import fastnas
from fastnas import reference
from fastnas.backends.layout import state_format
from fastnas.reference import SkipNoise
from fastnas.spaces import Edge, EdgeTable, EdgeTerm

EPS, MOMENTUM = 1e-5, 0.3
MEMORY = ("fast", "lean", "minimal")

Pair = tuple[Tensor, Tensor]

KERNELS = {
    "sep_3": ("sep_conv", 3, 1), "sep_5": ("sep_conv", 5, 1), "sep_7": ("sep_conv", 7, 1),
    "dil_3": ("dil_conv", 3, 2), "dil_5": ("dil_conv", 5, 2),
}  # fmt: skip
TERMS = ("max_pool", "avg_pool", "skip", *KERNELS)
# Every kind of kernel and no more, for what multiplies the cases.
FEW = ("max_pool", "avg_pool", "skip", "sep_3", "dil_5")


def term(name: str, weight: int, stride: int) -> EdgeTerm:
    """By its name in TERMS; "skip" is the strided one at stride 2."""
    if name == "skip":
        return EdgeTerm("skip" if stride == 1 else "reduce_skip", weight)
    op, size, dilation = KERNELS.get(name, (name, 0, 1))
    return EdgeTerm(op, weight, size, dilation)


def edge(source: int, target: int, stride: int = 1, names: Sequence[str] = TERMS) -> Edge:
    terms = tuple(term(name, k, stride) for k, name in enumerate(names))
    return Edge(source, target, stride, terms)


def one_edge(stride: int, *names: str) -> EdgeTable:
    return EdgeTable(1, 1, max(1, len(names or TERMS)), (edge(0, 0, stride, names or TERMS),))


def cell(stride: int, nodes: int = 4, names: Sequence[str] = TERMS) -> EdgeTable:
    """A DARTS cell: two inputs, every node fed by all states before it."""
    edges = [
        edge(source, node, stride if source < 2 else 1, names)
        for node in range(nodes)
        for source in range(2 + node)
    ]
    return EdgeTable(2, nodes, len(names), tuple(edges))


@dataclass(frozen=True, eq=False, repr=False)
class Inputs:
    """A call of mixed_edges and the gradient that comes back; given statistics mean eval."""

    table: EdgeTable
    x: list[Tensor]
    w: Tensor
    params: list[Tensor]
    dy: Tensor
    noise: SkipNoise | None = None
    level: Tensor | None = None
    rng: Tensor | None = None
    statistics: Tensor | None = None
    """[norms, 2, C] mean and variance."""

    @property
    def training(self) -> bool:
        return self.statistics is None

    @property
    def leaves(self) -> Results:
        x = {f"x[{i}]": t for i, t in enumerate(self.x)}
        params = {f"params[{i}]": t for i, t in enumerate(self.params)}
        return {"w": self.w, **x, **params}

    def initial_running(self) -> list[Pair]:
        if self.statistics is not None:
            return [(mean.clone(), var.clone()) for mean, var in self.statistics]
        wide = torch.promote_types(self.x[0].dtype, torch.float32)
        start = self.x[0].new_empty(self.x[0].shape[1], dtype=wide)
        return [
            (torch.full_like(start, 0.5), torch.full_like(start, 2.0))
            for _ in range(self.table.norms)
        ]

    def rebuilt(self, leaves: Sequence[Tensor]) -> Inputs:
        """The same call on other leaves, in the order of `leaves`."""
        w, *rest = leaves
        inputs = self.table.inputs
        return replace(self, w=w, x=list(rest[:inputs]), params=list(rest[inputs:]))

    def cpu(self) -> Inputs:
        level = None if self.level is None else self.level.cpu()
        rng = None if self.rng is None else self.rng.cpu()
        statistics = None if self.statistics is None else self.statistics.cpu()
        moved = self.rebuilt([t.cpu() for t in (self.w, *self.x, *self.params)])
        return replace(moved, dy=self.dy.cpu(), level=level, rng=rng, statistics=statistics)


def make(
    table: EdgeTable,
    size: tuple[int, int] = (5, 7),
    C: int = 6,
    N: int = 3,
    dtype: torch.dtype | None = None,
    *,
    target: Target | None = None,
    sizes: Sequence[tuple[int, int]] = (),
    noise: SkipNoise | None = None,
    offset: float = 0.0,
    w_dtype: torch.dtype | None = None,
    layouts: Sequence[str] = ("channels_last",),
    dy_layout: str = "channels_last",
    seed: int = 0,
) -> Inputs:
    """Normal x (about `offset`), params and dy, w of both signs; x[i] lies as layouts[i mod len].

    On the device of `target` and by default in its widest dtype; without one, on the CPU in
    float64. The values do not depend on the device.
    """
    device = target.device if target is not None else "cpu"
    if dtype is None:
        dtype = target.widest("mixed_edges") if target is not None else torch.float64
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, about: float = 0.0, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (about + scale * values).to(device, dtype)

    sizes = sizes or [size] * table.inputs
    x = [
        laid_out(normal(N, C, *s, about=offset), layouts[i % len(layouts)])
        for i, s in enumerate(sizes)
    ]
    shapes = table.param_shapes(C)
    params = [normal(*shape, scale=math.prod(shape[1:]) ** -0.5) for shape in shapes]
    shape = len(table.edges), table.candidates
    w = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
    first = table.edges[0]
    rows, cols = (-(-s // first.stride) for s in sizes[first.source])
    dy = laid_out(normal(N, table.nodes * C, rows, cols), dy_layout)
    level = rng = None
    if noise is not None:
        level = noise.level(0.7, torch.device(device))
        rng = torch.randint(2**62, (table.nodes, 2), generator=generator).to(device)
    return Inputs(table, x, w.to(device, w_dtype or dtype), params, dy, noise, level, rng)


def outside_of_training(inputs: Inputs) -> Inputs:
    """The same call with given statistics, which are not those of the batch, and no noise drawn."""
    shape = inputs.table.norms, 2, inputs.x[0].shape[1]
    generator = torch.Generator().manual_seed(5)
    statistics = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
    wide = torch.promote_types(inputs.x[0].dtype, torch.float32)
    return replace(inputs, statistics=statistics.to(inputs.x[0].device, wide), level=None, rng=None)


def call(
    inputs: Inputs,
    backend: str | None,
    memory: str = "lean",
    running: list[Pair] | None = None,
) -> Tensor:
    return fastnas.mixed_edges(
        inputs.x, inputs.w, inputs.params, inputs.table, running=running, momentum=MOMENTUM,
        training=inputs.training, eps=EPS, noise=inputs.noise, level=inputs.level, rng=inputs.rng,
        memory=memory, backend=backend,
    )  # fmt: skip


def with_gradients(
    f: Callable[[Sequence[Tensor]], Tensor],
    leaves: Results,
    dy: Tensor,
    needs: Collection[str] | None = None,
) -> Results:
    """y = f(leaves) and the gradients of those in `needs`, by default of all; no other may appear."""  # noqa: E501
    wanted = [needs is None or name in needs for name in leaves]
    own = [t.detach().requires_grad_(need) for t, need in zip(leaves.values(), wanted)]
    y = f(own)
    if y.requires_grad:
        y.backward(dy.to(y.dtype))
    results = {"y": y.detach()}
    for name, leaf, need in zip(leaves, own, wanted):
        assert need or leaf.grad is None, f"a gradient of {name}"
        if need:
            results[f"d{name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return results


def named(running: Sequence[Pair]) -> Results:
    """Of every norm the running mean and variance, by name."""
    return {
        f"running[{i}].{name}": t
        for i, pair in enumerate(running)
        for name, t in zip(("mean", "var"), pair)
    }


def run(
    inputs: Inputs,
    backend: str | None,
    needs: Collection[str] | None = None,
    memory: str = "lean",
) -> Results:
    """y, gradients and running statistics."""
    running = inputs.initial_running()
    results = with_gradients(
        lambda leaves: call(inputs.rebuilt(leaves), backend, memory, running),
        inputs.leaves, inputs.dy, needs,
    )  # fmt: skip
    return results | named(running)


def updated(running: Sequence[Pair], stats: Tensor, samples: int) -> Results:
    """As torch's batch norm updates them, with the unbiased variance."""
    pairs = []
    for (mean, var), (now, biased) in zip(running, stats):
        unbiased = biased * samples / (samples - 1)
        pairs.append((torch.lerp(mean.to(now.dtype), now, MOMENTUM),
                      torch.lerp(var.to(now.dtype), unbiased, MOMENTUM)))  # fmt: skip
    return named(pairs)


@lru_cache(maxsize=16)
def by_eager(inputs: Inputs, dtype: torch.dtype | None = None) -> Results:
    """The specification with torch's own autograd, in the dtype of the inputs or in a wider one."""
    inputs = inputs.cpu()
    leaves = inputs.leaves
    if dtype is not None:
        leaves = {name: t.to(dtype) for name, t in leaves.items()}
    wide = torch.promote_types(leaves["x[0]"].dtype, torch.float32)
    stats = torch.zeros(inputs.table.norms, 2, inputs.x[0].shape[1], dtype=wide)
    if inputs.statistics is not None:
        stats = inputs.statistics.to(wide)

    def f(leaves: Sequence[Tensor]) -> Tensor:
        given = inputs.rebuilt(leaves)
        form = inputs.noise.form if inputs.noise is not None and inputs.training else "none"
        return reference.mixed_edges(given.x, given.w, given.params, inputs.table, stats,
                                     training=inputs.training, eps=EPS, form=form,
                                     level=inputs.level, rng=inputs.rng)  # fmt: skip

    results = with_gradients(f, leaves, inputs.dy)
    y = results["y"]
    if not inputs.training:
        return results | named(inputs.initial_running())
    return results | updated(inputs.initial_running(), stats, y.numel() // y.shape[1])


def compare(got: Results, inputs: Inputs, allowance: Allowance = NOTHING) -> None:
    exact, eager = by_eager(inputs, torch.float64), by_eager(inputs)
    agree(got, exact, eager, inputs.x[0].dtype, allowance)


def moved_by_rounding(inputs: Inputs, exact: Callable[[Inputs], Results]) -> Results:
    """How much the exact results move where all inputs move by `roundings`.

    Or by one in their own dtype, in which the input of a second half is stored.
    """
    generator, dtype = torch.Generator().manual_seed(0), inputs.x[0].dtype
    by = max(roundings(dtype), torch.finfo(dtype).eps)
    leaves = [nudged(t, by, generator) for t in inputs.leaves.values()]
    moved = replace(inputs.rebuilt(leaves), dy=nudged(inputs.dy, by, generator))
    here, there = exact(inputs), exact(moved)
    return {name: there[name] - t for name, t in here.items()}


def same_bits(got: Results, want: Results) -> None:
    assert got.keys() == want.keys()
    for name, t in got.items():
        assert torch.equal(bits(t), bits(want[name])), name


def examine(got: Results, inputs: Inputs, allowance: Allowance = NOTHING) -> None:
    """The rule, the layout of the result, and that no output shares memory with an input."""
    compare(got, inputs, allowance)
    layout = state_format(got["y"])
    assert got["y"].is_contiguous(memory_format=layout)
    own_memory(got.values(), (inputs.dy, *inputs.leaves.values()))


def check(
    inputs: Inputs,
    backend: str,
    needs: Collection[str] | None = None,
    memory: str = "lean",
) -> Results:
    """A call, examined."""
    got = run(inputs, backend, needs, memory)
    examine(got, inputs)
    return got
