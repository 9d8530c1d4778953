"""Sizes of zero in every dimension: what eager gives, or one clear error; never a signal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from cases import FORMS, noise_of
from edge_cases import Edge, EdgeTable, EdgeTerm, edge, one_edge
from op_calls import Call, differentiable, results
from targets import Target
from torch import Tensor

from fastnas import ops

SIZES = (2, 4, 3, 4)  # N, C, H, W
ZEROS = [zeros for n in (1, 2, 4) for zeros in itertools.combinations(range(4), n)]
NODE_OF_NOTHING = EdgeTable(1, 1, 1, (Edge(0, 0, 1, ()),))
TABLES = {
    "skips": EdgeTable(2, 1, 1, (edge(0, 0, 1, ("skip",)), edge(1, 0, 1, ("skip",)))),
    "all": one_edge(1),
    "all at stride 2": one_edge(2),
    "nothing": NODE_OF_NOTHING,
    "a pool behind a skip": EdgeTable(
        1, 2, 1, (Edge(0, 0, 1, (EdgeTerm("skip", 0),)), Edge(1, 1, 1, (EdgeTerm("avg_pool", 0),)))
    ),
}


def sizes() -> Iterator[tuple[int, ...]]:
    for zeros in ZEROS:
        yield tuple(0 if i in zeros else size for i, size in enumerate(SIZES))


def statistics(C: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(C), torch.ones(C)


def noise(form: str | None, streams: tuple[int, ...] = ()) -> Call:
    if form is None:
        return {}
    drawn = noise_of(form)
    return {"noise": drawn, "level": drawn.level(), "rng": torch.ones(*streams, 2).long()}


def sums() -> Iterator[Call]:
    shapes = [*sizes(), (0,), (3, 0), (0, 3), (2, 0, 3), (2, 3, 0, 4, 5)]
    for shape, form in itertools.product(shapes, (None, *FORMS)):
        x = [torch.ones(shape) for _ in range(3)]
        yield {"x": x, "w": torch.ones(3), "noisy": [1] if form else [], **noise(form)}


def norm_sums() -> Iterator[Call]:
    shapes = [*sizes(), (0, 3), (3, 0), (0, 3, 2), (2, 0, 2), (2, 3, 0)]
    for shape, form, training, normed in itertools.product(
        shapes, (None, "gaussian_additive"), (True, False), (True, False)
    ):
        yield {
            "z": [torch.ones(shape) for _ in range(2)],
            "w": torch.ones(2),
            "normed": [normed, False],
            "running": [statistics(shape[1]) if normed else None, None],
            "training": training,
            "noisy": [1] if form else [],
            **noise(form),
        }


def edges() -> Iterator[Call]:
    for table, shape, form, training, memory in itertools.product(
        TABLES.values(), sizes(), (None, "gaussian_additive"), (True, False), ("fast", "minimal")
    ):
        yield {
            "x": [torch.ones(shape) for _ in range(table.inputs)],
            "w": torch.ones(len(table.edges), table.candidates),
            "params": [torch.ones(p) for p in table.param_shapes(shape[1])],
            "table": table,
            "running": [statistics(shape[1]) for _ in range(table.norms)],
            "training": training,
            "memory": memory,
            **noise(form, (table.nodes,)),
        }


def convolutions() -> Iterator[Call]:
    for shape, kernels, C, training in itertools.product(
        [SIZES, *sizes()], (1, 2), (0, 5), (True, False)
    ):
        if 0 in (*shape, C):
            yield {
                "x": torch.ones(shape),
                "params": [torch.ones(C, shape[1], 1, 1) for _ in range(kernels)],
                "running": statistics(kernels * C),
                "training": training,
            }


def samples() -> Iterator[Call]:
    for shape, topology, paths in itertools.product(
        [(0, 3, 2), (2, 0, 3, 2), (0, 0, 3, 2), (3, 0), (0, 2), (0, 3, 0)],
        ("none", "top2", "pairs"),
        (1, 0, 3),
    ):
        beta = None if topology == "none" else torch.zeros(*shape[:-2], 3)
        yield {"alpha": torch.zeros(shape), "beta": beta, "nodes": (3,), "tau": 1.0,
               "topology": topology, "paths": paths, "rng": torch.tensor([1, 2])}  # fmt: skip


CALLS = {
    "mixed_sum": sums,
    "mixed_norm_sum": norm_sums,
    "mixed_edges": edges,
    "relu_conv_bn": convolutions,
    "sample_paths": samples,
}


def outcome(name: str, given: Call, backend: str) -> list[Tensor] | str:
    """The results, with gradients where there are any, or what the error says."""
    given = {k: [t.clone() for t in v] if k in ("x", "z") and isinstance(v, list) else v
             for k, v in given.items()}  # fmt: skip
    try:
        if given.get("training", True):
            return results(name, given, backend)
        with torch.no_grad():
            for t in differentiable(name, given):
                t.requires_grad_(False)
            return [getattr(ops, name)(**given, backend=backend)]
    except (ValueError, TypeError) as error:
        return str(error)


@pytest.mark.backends("cpu", "cuda-host", "triton")
@pytest.mark.parametrize("name", CALLS)
def test_as_eager_or_one_clear_error(backend: Target, name: str) -> None:
    if backend.table == "triton" and name == "mixed_edges":
        pytest.skip("mixed_edges has no Triton kernel")
    served = refused = 0
    for given in CALLS[name]():
        found, expected = (outcome(name, given, b) for b in (backend.name, "eager"))
        if isinstance(expected, str):
            assert found == expected
            assert expected.startswith((f"{name}: ", "Expected more than 1 value per channel"))
            refused += 1
        else:
            assert not isinstance(found, str), found
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, equal_nan=True)
            served += 1
    assert served or name == "mixed_edges"
    assert served + refused > 30


def test_no_images_in_evaluation() -> None:
    x, running = torch.ones(0, 4, 3, 5), statistics(6)
    y = ops.relu_conv_bn(x, [torch.ones(6, 4, 1, 1)], running=running, training=False)
    assert y.shape == (0, 6, 3, 5)
