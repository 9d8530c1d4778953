"""mixed_edges with a sampled candidate per edge: a call, and the dense reference beside it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from edge_cases import EPS, MOMENTUM, Inputs, named, updated, with_gradients
from rule import Results, agree
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
    """y, gradients (in training, where there are some) and running statistics."""
    running = inputs.initial_running()

    def f(leaves: Sequence[Tensor]) -> Tensor:
        own = inputs.rebuilt(leaves)
        return fastnas.mixed_edges(
            own.x, own.w, own.params, own.table, choice=choice.to(own.w.device), running=running,
            momentum=MOMENTUM, training=own.training, eps=EPS, noise=own.noise, level=own.level,
            rng=own.rng, memory=memory, backend=backend,
        )  # fmt: skip

    needs = needs if inputs.training else ()
    return with_gradients(f, inputs.leaves, inputs.dy, needs) | named(running)


def by_dense(inputs: Inputs, choice: Tensor, dtype: torch.dtype) -> Results:
    """Path by path the reference with all candidates, the weights of the others 0."""
    inputs = inputs.cpu()
    rows = choice.reshape(-1, choice.shape[-1])
    table, wide = inputs.table, torch.promote_types(dtype, torch.float32)
    columns = [(e, t.weight) for e, edge in enumerate(table.edges) for t in edge.terms
               for _ in range(t.norms)]  # fmt: skip
    running = [(mean.to(wide), var.to(wide)) for mean, var in inputs.initial_running()]

    def along(row: Tensor, x: list[Tensor], w: Tensor, own: Inputs) -> Tensor:
        """One path; moves the running statistics of the norms on it."""
        there = row >= 0
        dense = torch.zeros(len(row), table.candidates, dtype=dtype)
        dense = dense.index_put((torch.arange(len(row))[there], row[there]), w[there])
        stats = torch.zeros(table.norms, 2, x[0].shape[1], dtype=wide)
        if own.statistics is not None:
            stats = own.statistics.to(wide)
        form = own.noise.form if own.noise is not None and own.training else "none"
        y = reference.mixed_edges(x, dense, own.params, table, stats, training=own.training,
                                  eps=EPS, form=form, level=own.level, rng=own.rng)  # fmt: skip
        for i, (e, k) in enumerate(columns):
            if own.training and row[e] == k:
                moved = updated([running[i]], stats[i : i + 1], y.numel() // y.shape[1])
                running[i] = moved["running[0].mean"], moved["running[0].var"]
        return y

    def f(leaves: Sequence[Tensor]) -> Tensor:
        own = inputs.rebuilt(leaves)
        groups = zip(*(t.chunk(len(rows)) for t in own.x))
        return torch.cat([
            along(row, list(x), w, own)
            for row, x, w in zip(rows, groups, own.w.reshape(len(rows), -1))
        ])  # fmt: skip

    leaves = {name: t.to(dtype) for name, t in inputs.leaves.items()}
    results = with_gradients(f, leaves, inputs.dy, None if inputs.training else ())
    return results | named(running)


def compare(got: Results, inputs: Inputs, choice: Tensor) -> None:
    dtype = inputs.x[0].dtype
    agree(got, by_dense(inputs, choice, torch.float64), by_dense(inputs, choice, dtype), dtype)


def check(inputs: Inputs, choice: Tensor, backend: str, memory: str = "lean") -> None:
    compare(run(inputs, choice, backend, memory), inputs, choice)
