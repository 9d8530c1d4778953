"""mixed_edges with a sampled candidate per edge: a call, and the dense reference beside it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from edge_cases import EPS, MOMENTUM, Inputs, named, updated, with_gradients
from rule import NOTHING, Allowance, Results, agree
from torch import Tensor

import fastnas
from fastnas import reference


def run(
    inputs: Inputs,
    choice: Tensor,
    backend: str | None,
    memory: str = "lean",
    needs: Collection[str] | None = None,
) -> Results:
    """y, gradients and running statistics."""
    running = inputs.initial_running()

    def f(leaves: Sequence[Tensor]) -> Tensor:
        own = inputs.rebuilt(leaves)
        return fastnas.mixed_edges(
            own.x, own.w, own.params, own.table, choice=choice.to(own.w.device), running=running,
            momentum=MOMENTUM, training=own.training, eps=EPS, noise=own.noise, level=own.level,
            rng=own.rng, memory=memory, backend=backend,
        )  # fmt: skip

    return with_gradients(f, inputs.leaves, inputs.dy, needs) | named(running)


def by_dense(inputs: Inputs, choice: Tensor, dtype: torch.dtype | None = None) -> Results:
    """Path by path the reference with all candidates, the weights of the others 0.

    In the dtype of the inputs or in a wider one.
    """
    table = inputs.table
    norms = [(e, t.weight) for e, edge in enumerate(table.edges) for t in edge.terms
             for _ in range(t.norms)]  # fmt: skip

    def dense(own: Inputs, row: Tensor) -> tuple[Inputs, list[int]]:
        there = row >= 0
        w = own.w.new_zeros(len(row), table.candidates)
        w = w.index_put((torch.arange(len(row))[there], row[there]), own.w[there])
        return replace(own, w=w), [i for i, (e, k) in enumerate(norms) if row[e] == k]

    return _by(dense, inputs, choice, dtype)


def by_path(inputs: Inputs, choice: Tensor, dtype: torch.dtype | None = None) -> Results:
    """Path by path the reference with the table of the path: no inf of another candidate, times a
    weight of 0, is NaN."""

    def alone(own: Inputs, row: Tensor) -> tuple[Inputs, list[int]]:
        path = own.table.path(row.tolist())
        statistics = None if own.statistics is None else own.statistics[list(path.norms)]
        return replace(
            own, table=path.table, w=own.w[list(path.edges), None],
            params=[own.params[i] for i in path.params], statistics=statistics,
        ), list(path.norms)  # fmt: skip

    return _by(alone, inputs, choice, dtype)


def _by(
    of_path: Callable[[Inputs, Tensor], tuple[Inputs, list[int]]],
    inputs: Inputs,
    choice: Tensor,
    dtype: torch.dtype | None,
) -> Results:
    """`of_path` gives the call of one path, and which running statistics its norms move."""
    inputs = inputs.cpu()
    rows = choice.reshape(-1, choice.shape[-1])
    leaves = inputs.leaves
    if dtype is not None:
        leaves = {name: t.to(dtype) for name, t in leaves.items()}
    wide = torch.promote_types(leaves["x[0]"].dtype, torch.float32)
    running = [(mean.to(wide), var.to(wide)) for mean, var in inputs.initial_running()]

    def along(own: Inputs, row: Tensor) -> Tensor:
        own, norms = of_path(own, row)
        stats = torch.zeros(own.table.norms, 2, own.x[0].shape[1], dtype=wide)
        if own.statistics is not None:
            stats = own.statistics.to(wide)
        form = own.noise.form if own.noise is not None and own.training else "none"
        y = reference.mixed_edges(own.x, own.w, own.params, own.table, stats,
                                  training=own.training, eps=EPS, form=form, level=own.level,
                                  rng=own.rng)  # fmt: skip
        if own.training:
            everyone = range(len(stats)) if len(stats) == len(norms) else norms
            for i, norm in zip(everyone, norms):
                moved = updated([running[norm]], stats[i : i + 1], y.numel() // y.shape[1])
                running[norm] = moved["running[0].mean"], moved["running[0].var"]
        return y

    def f(leaves: Sequence[Tensor]) -> Tensor:
        own, paths = inputs.rebuilt(leaves), len(rows)
        streams = [None] * paths if own.rng is None else own.rng.reshape(paths, -1, 2)
        groups = zip(rows, zip(*(t.chunk(paths) for t in own.x)), own.w.reshape(paths, -1), streams)
        return torch.cat([along(replace(own, x=list(x), w=w, rng=rng), row)
                          for row, x, w, rng in groups])  # fmt: skip

    results = with_gradients(f, leaves, inputs.dy)
    return results | named(running)


def compare(
    got: Results,
    inputs: Inputs,
    choice: Tensor,
    by: Callable[..., Results] = by_dense,
    allowance: Allowance = NOTHING,
) -> None:
    exact, eager = by(inputs, choice, torch.float64), by(inputs, choice)
    agree(got, exact, eager, inputs.x[0].dtype, allowance)


def check(inputs: Inputs, choice: Tensor, backend: str, memory: str = "lean") -> None:
    compare(run(inputs, choice, backend, memory), inputs, choice)
