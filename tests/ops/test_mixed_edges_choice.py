"""mixed_edges with a sampled candidate per edge: against the dense op, the other weights 0."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import noise_of
from choice_cases import check, run
from edge_cases import (
    EPS,
    FEW,
    MEMORY,
    MOMENTUM,
    Inputs,
    cell,
    edge,
    make,
    named,
    outside_of_training,
)
from targets import Target
from torch import Tensor

import fastnas
from fastnas.ops.device_choice import choice_on_device, sampled_params
from fastnas.spaces import EdgeTable

OP = "mixed_edges"
pytestmark = pytest.mark.backends("eager", "cpu", "cuda-host", "cuda")

NAMES = (*FEW, "sep_5", "dil_3")
NONE = len(NAMES)
"""A column that no term has, as that of `none`."""


@pytest.fixture(autouse=True, params=["host", "device"])
def reader(request: pytest.FixtureRequest) -> Iterator[None]:
    """Who reads the choice; only CUDA's kernels can in place of the host."""
    if request.param == "host":
        yield
        return
    if "cuda" not in request.node.name:
        pytest.skip("only kernels on CUDA read a choice")
    with choice_on_device():
        yield


def table(stride: int) -> EdgeTable:
    return replace(cell(stride, 3, NAMES), candidates=NONE + 1)


def sampled(paths: int | None, seed: int = 0, edges: int = 9) -> Tensor:
    """Columns from -1 (not there) to `none`, path by path."""
    generator = torch.Generator().manual_seed(seed)
    shape = (edges,) if paths is None else (paths, edges)
    return torch.randint(-1, NONE + 1, shape, generator=generator)


def given(choice: Tensor, stride: int = 1, seed: int = 0, **options: Any) -> Inputs:
    paths = choice.shape[0] if choice.dim() == 2 else 1
    inputs = make(table(stride), (6, 5), C=4, N=2 * paths, seed=seed, **options)
    w = torch.rand(choice.shape, generator=torch.Generator().manual_seed(seed)) + 0.5
    return replace(inputs, w=w.to(inputs.w))


@pytest.mark.parametrize("paths", [None, 1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_equals_the_dense_op_with_the_other_weights_zero(
    backend: Target, stride: int, paths: int | None
) -> None:
    seed = 2 * (paths or 0) + stride
    choice = sampled(paths, seed)
    check(given(choice, stride, seed, target=backend), choice, backend.name)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("memory", MEMORY)
def test_every_setting_of_memory_and_dtype(
    backend: Target, dtype: torch.dtype, memory: str
) -> None:
    choice = sampled(2, seed=5)
    check(given(choice, 2, dtype=dtype), choice, backend.name, memory)


@pytest.mark.backends("cuda-host", "cuda")
@pytest.mark.parametrize("memory", ["fast", "minimal"])
def test_what_kernels_hold_otherwise(backend: Target, memory: str) -> None:
    dtype = torch.bfloat16 if memory == "fast" else torch.float32
    choice = sampled(None, seed=5)
    check(given(choice, 2, dtype=dtype, target=backend), choice, backend.name, memory)


@pytest.mark.parametrize("node", [0, 1, 2])
def test_a_node_that_nothing_enters_is_zeros(backend: Target, node: int) -> None:
    first, last = [(0, 2), (2, 5), (5, 9)][node]
    for empty in (-1, NONE):
        choice = sampled(None, seed=1).clamp(min=0)
        choice[first:last] = empty
        inputs = given(choice, 2, target=backend)
        check(inputs, choice, backend.name)
        y = run(inputs, choice, backend.name)["y"]
        assert not y[:, node * 4 : (node + 1) * 4].any()


def test_a_path_with_nothing_in_it(backend: Target) -> None:
    for empty in (-1, NONE):
        choice = torch.full((9,), empty)
        check(given(choice, target=backend), choice, backend.name)


@pytest.mark.backends("eager", "cpu")
def test_what_is_not_sampled_has_no_gradient(backend: Target) -> None:
    choice = torch.stack([sampled(None, 1), sampled(None, 2)])
    choice[:, [0, 2, 5]] = -1  # nothing leaves the first input
    inputs = given(choice)
    x, params = ([t.requires_grad_() for t in some] for some in (inputs.x, inputs.params))
    y = fastnas.mixed_edges(x, inputs.w, params, inputs.table, choice=choice, backend=backend.name)
    y.backward(inputs.dy)
    wanted = [
        bool((choice[:, e] == term.weight).any())
        for e, edge in enumerate(inputs.table.edges)
        for term in edge.terms
        for _ in range(term.params)
    ]
    assert [p.grad is not None for p in params] == wanted
    assert x[0].grad is None
    assert x[1].grad is not None


@pytest.mark.backends("cuda-host", "cuda")
def test_on_the_device_it_has_zeros(backend: Target) -> None:
    choice = sampled(None, 1)
    inputs = given(choice, target=backend)
    params = [p.requires_grad_() for p in inputs.params]
    choice = choice.to(inputs.w.device)
    with choice_on_device():
        y = fastnas.mixed_edges(inputs.x, inputs.w, params, inputs.table, choice=choice,
                                backend=backend.name)  # fmt: skip
    y.backward(inputs.dy)
    moved = sampled_params(inputs.table, choice)
    assert len(moved) == len(params)
    assert 0 < moved.sum() < len(moved)
    for p, sampled_here in zip(params, moved):
        assert p.grad is not None
        assert bool(p.grad.any()) == bool(sampled_here)


def test_several_paths_are_calls_one_after_the_other(backend: Target) -> None:
    choice = sampled(3, seed=3)
    inputs = given(choice, target=backend)
    together, running = run(inputs, choice, backend.name), inputs.initial_running()
    groups = zip(*(x.chunk(3) for x in inputs.x))
    for p, (row, x) in enumerate(zip(choice, groups)):
        y = fastnas.mixed_edges(
            list(x), inputs.w[p], inputs.params, inputs.table, choice=row.to(inputs.w.device),
            running=running, momentum=MOMENTUM, eps=EPS, backend=backend.name,
        )  # fmt: skip
        assert torch.equal(y, together["y"].chunk(3)[p])
    assert all(torch.equal(t, together[name]) for name, t in named(running).items())


def test_noise_on_the_chosen_skips(backend: Target) -> None:
    """Streams count the skips of a path, and each path has its own."""
    skip = NAMES.index("skip")
    choice = torch.tensor([[skip, -1, skip, 0, -1, 1, -1, 0, -1]] * 2)
    noise = noise_of("gaussian_additive")
    inputs = given(choice[0], noise=noise, target=backend)
    check(inputs, choice[0], backend.name)
    paths = given(choice, noise=noise, target=backend)
    assert paths.rng is not None
    streams = torch.stack([paths.rng, paths.rng + 1])
    same = replace(paths, x=[torch.cat([t[:2]] * 2) for t in paths.x],
                   w=paths.w[:1].expand(2, -1))  # fmt: skip
    first, second = run(replace(same, rng=streams), choice, backend.name)["y"].chunk(2)
    assert not torch.equal(first, second)
    streams[1] = streams[0]
    first, second = run(replace(same, rng=streams), choice, backend.name)["y"].chunk(2)
    assert torch.equal(first, second)


@pytest.mark.parametrize("stride", [1, 2])
def test_outside_of_training_it_uses_the_running_statistics(backend: Target, stride: int) -> None:
    for paths in (None, 2):
        choice = sampled(paths, seed=4)
        inputs = outside_of_training(given(choice, stride, target=backend))
        check(inputs, choice, backend.name)


TABLE = EdgeTable(2, 1, 2, (edge(0, 0, 1, ("skip", "dil_3")), edge(1, 0, 1, ("max_pool",))))
GIVEN = make(TABLE, (4, 3), C=4, N=2, dtype=torch.float32)
BAD: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "choice is torch.int32; an int64 Tensor is needed",
     {"choice": torch.zeros(2, dtype=torch.int32)}),
    (TypeError, "choice is a list; a Tensor is needed", {"choice": [0, 0]}),
    (ValueError, "choice has shape [3]; [2] or [paths, 2] is needed",
     {"choice": torch.zeros(3, dtype=torch.int64)}),
    (ValueError, "choice has shape [0, 2]; [2] or [paths, 2] is needed",
     {"choice": torch.zeros(0, 2, dtype=torch.int64)}),
    (ValueError, "choice of edge 1 is 2; -1 to 1 is allowed", {"choice": torch.tensor([0, 2])}),
    (ValueError, "choice of edge 0 is -2; -1 to 1 is allowed", {"choice": torch.tensor([-2, 0])}),
    (ValueError, "choice is on meta, x[0] on cpu",
     {"choice": torch.zeros(2, dtype=torch.int64, device="meta")}),
    (ValueError, "w has shape [2, 2]; that of choice, [2], is needed", {"w": torch.ones(2, 2)}),
    (ValueError, "x[0] has 2 images; a multiple of the 3 paths is needed",
     {"choice": torch.zeros(3, 2, dtype=torch.int64), "w": torch.ones(3, 2)}),
    (ValueError, "x has 1 states; the table needs 2", {"x": GIVEN.x[:1]}),
    (TypeError, "w is torch.int64; a floating point dtype is needed",
     {"w": torch.ones(2, dtype=torch.int64)}),
    (ValueError, "params has 1 tensors; 2 are needed", {"params": GIVEN.params[:1]}),
    (ValueError, "params[1] has shape [4, 4]; [4, 4, 1, 1] is needed",
     {"choice": torch.tensor([1, 0]), "params": [GIVEN.params[0], torch.ones(4, 4)]}),
    (ValueError, "running has 1 norms; 2 are needed",
     {"running": [(torch.zeros(4), torch.ones(4))]}),
    (ValueError, "rng is torch.int64 [2, 1, 2]; torch.int64 [1, 2] is needed",
     {"noise": noise_of("uniform_additive"), "rng": torch.ones(2, 1, 2, dtype=torch.int64)}),
    (ValueError, "memory is 'most'; allowed: fast, lean, minimal", {"memory": "most"}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changes"), BAD, ids=[case[1] for case in BAD])
def test_bad_input(error: type[Exception], message: str, changes: dict[str, Any]) -> None:
    arguments = {
        "x": GIVEN.x, "w": torch.ones(2), "params": GIVEN.params, "table": TABLE,
        "choice": torch.zeros(2, dtype=torch.int64),
    } | changes  # fmt: skip
    with pytest.raises(error, match=re.escape(message)):
        fastnas.mixed_edges(**arguments)


def test_a_path_of_a_table() -> None:
    path = table(2).path([0, -1, NONE, -1, NONE, 4, 2, -1, 0])
    assert path.edges == (0, 2, 5, 6, 8)
    assert [(e.source, e.target, [t.op for t in e.terms]) for e in path.table.edges] == [
        (0, 0, ["max_pool"]),
        (0, 1, []),
        (0, 2, ["dil_conv"]),
        (1, 2, ["reduce_skip"]),
        (3, 2, ["max_pool"]),
    ]
    assert all(term.weight == 0 for _, term in path.table.terms)
    assert path.inputs == {0, 1}
    with pytest.raises(ValueError, match="choice has 2 edges; the table has 9"):
        table(1).path([0, 0])
