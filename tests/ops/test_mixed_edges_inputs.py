"""Bad input to mixed_edges and EdgeTable: an error that says what was given and what is allowed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from cases import noise_of
from edge_cases import edge, make, one_edge
from targets import Target

import fastnas
from fastnas import BackendError
from fastnas.ops import OPS
from fastnas.spaces import Edge, EdgeTable, EdgeTerm

TABLE = EdgeTable(2, 1, 2, (edge(0, 0, 1, ("skip", "dil_3")), edge(1, 0, 1, ("max_pool",))))
GIVEN = make(TABLE, (4, 3), C=4, N=2, dtype=torch.float32)
X, W, PARAMS = GIVEN.x, GIVEN.w, GIVEN.params
NOISE = noise_of("gaussian_additive")
PAIR = torch.zeros(4), torch.ones(4)
RUNNING = [PAIR, PAIR]
STRIDED = EdgeTable(2, 1, 1, (edge(0, 0, 2, ("skip",)), edge(1, 0, 1, ("skip",))))

BAD: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, "memory is 'most'; allowed: fast, lean, minimal", {"memory": "most"}),
    (ValueError, "x has 1 states; the table needs 2", {"x": X[:1]}),
    (TypeError, "x[1] is a float; a Tensor is needed", {"x": [X[0], 1.0]}),
    (ValueError, "x[0] has shape [4, 3]; [N, C, H, W] is needed", {"x": [X[0][0, 0], X[1]]}),
    (TypeError, "x[0] is torch.int64; allowed: float32, bfloat16, float16, float64",
     {"x": [x.long() for x in X]}),
    (TypeError, "x[1] is torch.float64, x is torch.float32; one dtype is needed",
     {"x": [X[0], X[1].double()]}),
    (ValueError, "x[1] is on meta, x on cpu", {"x": [X[0], X[1].to("meta")]}),
    (ValueError, "x[1] has shape [1, 4, 4, 3], x[0] [2, 4, 4, 3]; N and C must be the same",
     {"x": [X[0], X[1][:1]]}),
    (ValueError, "x[1] has shape [2, 3, 4, 3], x[0] [2, 4, 4, 3]; N and C must be the same",
     {"x": [X[0], X[1][:, :3]]}),
    (ValueError, "edge 1 gives [2, 4, 4, 2] from x[1] at stride 1, edge 0 gives [2, 4, 4, 3]; all"
     " nodes need one size", {"x": [X[0], X[1][..., :2]]}),
    (ValueError, "edge 1 gives [2, 4, 4, 3] from x[1] at stride 1, edge 0 gives [2, 4, 2, 2]",
     {"table": STRIDED, "w": W[:, :1], "params": [torch.ones(2, 4, 1, 1)] * 2}),
    (TypeError, "w is a list; a Tensor is needed", {"w": [1.0]}),
    (TypeError, "w is torch.int64; a floating point dtype is needed", {"w": W.long()}),
    (ValueError, "w has shape [2]; [2, 2] is needed, edges by candidates", {"w": W[0]}),
    (ValueError, "w has shape [1, 2]; [2, 2] is needed, edges by candidates", {"w": W[:1]}),
    (ValueError, "w is on meta, x on cpu", {"w": W.to("meta")}),
    (ValueError, "params has 1 tensors; 2 are needed", {"params": PARAMS[:1]}),
    (ValueError, "params[0] has shape [4, 4, 1, 1]; [4, 1, 3, 3] is needed",
     {"params": PARAMS[::-1]}),
    (TypeError, "params[1] is torch.float64, x is torch.float32; one dtype is needed",
     {"params": [PARAMS[0], PARAMS[1].double()]}),
    (ValueError, "params[0] is on meta, x on cpu", {"params": [PARAMS[0].to("meta"), PARAMS[1]]}),
    (TypeError, "params[0] is a NoneType; a Tensor is needed", {"params": [None, PARAMS[1]]}),
    (TypeError, "table is a list; an EdgeTable is needed", {"table": []}),
    (ValueError, "running has 1 norms; 2 are needed", {"running": RUNNING[:1]}),
    (ValueError, "running[0]", {"running": [(PAIR[0], PAIR[1][:2]), PAIR]}),
    (ValueError, "running[1]", {"running": [PAIR, (PAIR[0][:1], PAIR[1][:1])]}),
    (ValueError, "running[1]", {"running": [PAIR, (PAIR[0][:1], PAIR[1][:1])], "training": False}),
    (TypeError, "running[0] is no pair of Tensors", {"running": [PAIR[:1], PAIR]}),
    (ValueError, "running[0] is None, but training is False",
     {"running": [None, PAIR], "training": False}),
    (ValueError, "eps is -1", {"eps": -1}),
    (ValueError, "eps is nan", {"eps": float("nan")}),
    (ValueError, "1 value(s) per channel, x has shape [1, 4, 1, 1]; more than 1 is needed in"
     " training", {"x": [x[:1, :, :1, :1] for x in X]}),
    (ValueError, "0 value(s) per channel, x has shape [0, 4, 4, 3]", {"x": [x[:0] for x in X]}),
    (ValueError, "training is False and running is None; statistics are needed",
     {"training": False}),
    (ValueError, "level or rng is given, but noise is None", {"level": NOISE.level()}),
    (ValueError, "level or rng is given, but noise is None",
     {"rng": torch.ones(1, 2, dtype=torch.int64)}),
    (ValueError, "level is torch.float32 [2]; torch.float64 [2] is needed",
     {"noise": NOISE, "level": NOISE.level().float()}),
    (ValueError, "rng is torch.int64 [2]; torch.int64 [1, 2] is needed",
     {"noise": NOISE, "rng": torch.ones(2, dtype=torch.int64)}),
    (ValueError, "rng is on meta, the terms on cpu",
     {"noise": NOISE, "rng": torch.ones(1, 2, dtype=torch.int64, device="meta")}),
    (BackendError, "backend is 'cdua'; allowed: eager, cpu", {"backend": "cdua"}),
    (BackendError, "backend='cuda' cannot run mixed_edges", {"backend": "cuda"}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changes"), BAD, ids=[case[1] for case in BAD])
def test_bad_input(error: type[Exception], message: str, changes: dict[str, Any]) -> None:
    given = {"x": X, "w": W, "params": PARAMS, "table": TABLE} | changes
    before = [t.clone() for t in PAIR]
    with pytest.raises(error, match=re.escape(message)):
        fastnas.mixed_edges(**given)
    assert all(torch.equal(t, saved) for t, saved in zip(PAIR, before)), "running was updated"


@pytest.mark.backends("eager", "cpu", "cuda-host", "cuda")
def test_an_odd_number_of_channels_cannot_be_halved(backend: Target) -> None:
    inputs = make(one_edge(2, "skip"), (4, 4), C=5, target=backend)
    with pytest.raises(ValueError, match=r"mixed_edges: .*5 channels"):
        fastnas.mixed_edges(inputs.x, inputs.w, inputs.params, inputs.table,
                            backend=backend.name)  # fmt: skip


def test_a_skip_alone_needs_no_statistics() -> None:
    """One value per channel, and no running statistics outside of training."""
    table = one_edge(1, "skip")
    x = torch.ones(1, 4, 1, 1)
    y = fastnas.mixed_edges([x], torch.ones(1, 1), [], table, training=False)
    assert torch.equal(y, x)
    y = fastnas.mixed_edges([x], torch.ones(1, 1), [], table, running=[], training=False)
    assert torch.equal(y, x)


def test_any_sequence_will_do() -> None:
    y = fastnas.mixed_edges(tuple(X), W, tuple(PARAMS), TABLE, running=tuple(RUNNING))
    assert y.shape == (2, 4, 4, 3)


def test_meta_tensors_give_the_shape() -> None:
    meta = [[t.to("meta") for t in ts] for ts in (X, [W], PARAMS)]
    y = fastnas.mixed_edges(meta[0], meta[1][0], meta[2], TABLE)
    assert y.shape == (2, 4, 4, 3) and y.device.type == "meta"


def test_the_table_says_why_triton_has_no_kernel() -> None:
    absent = OPS["mixed_edges"].absent
    assert set(absent) == {"triton"}
    assert absent["triton"]


@pytest.mark.backends("cuda-host", "cuda")
def test_there_is_no_float64_on_cuda(backend: Target) -> None:
    x, params = ([t.double().to(backend.device) for t in ts] for ts in (X, PARAMS))
    message = f"backend='{backend.name}' cannot run mixed_edges: mixed_edges has no float64 kernel"
    with pytest.raises(BackendError, match=re.escape(message)):
        fastnas.mixed_edges(x, W.to(backend.device), params, TABLE, backend=backend.name)


@pytest.mark.backends("cpu")
def test_float16_is_eager_on_the_cpu(backend: Target) -> None:
    x, params = ([t.half() for t in ts] for ts in (X, PARAMS))
    message = "backend='cpu' cannot run mixed_edges: mixed_edges has no float16 kernel on cpu"
    with pytest.raises(BackendError, match=re.escape(message)):
        fastnas.mixed_edges(x, W, params, TABLE, backend=backend.name)
    y = fastnas.mixed_edges(x, W, params, TABLE)
    assert torch.equal(y, fastnas.mixed_edges(x, W, params, TABLE, backend="eager"))


SKIP = EdgeTerm("skip", 0)
POOL = EdgeTerm("max_pool", 0)
TABLES: list[tuple[str, tuple[int, int, int, tuple[Edge, ...]]]] = [
    ("no edge enters node 0", (1, 1, 1, ())),
    ("no edge enters node 1", (1, 2, 1, (Edge(0, 0, 1, (SKIP,)),))),
    ("edge 0 enters node 1 of 1", (1, 1, 1, (Edge(0, 1, 1, (SKIP,)),))),
    ("edge 0 enters node -1 of 1", (1, 1, 1, (Edge(0, -1, 1, (SKIP,)),))),
    ("edge 0 leaves state 1, which comes after its node", (1, 1, 1, (Edge(1, 0, 1, (SKIP,)),))),
    ("edge 0 leaves state -1, which comes after its node", (1, 1, 1, (Edge(-1, 0, 1, (SKIP,)),))),
    ("edge 0 has stride 3 from state 0", (1, 1, 1, (Edge(0, 0, 3, (POOL,)),))),
    ("edge 1 has stride 2 from state 1",
     (1, 2, 1, (Edge(0, 0, 1, (SKIP,)), Edge(1, 1, 2, (POOL,))))),
    ("edge 0: no op 'conv'; there are max_pool, avg_pool, skip, reduce_skip, sep_conv, dil_conv",
     (1, 1, 1, (Edge(0, 0, 1, (EdgeTerm("conv", 0),)),))),
    ("edge 0: mixing weight 1 of 1", (1, 1, 1, (Edge(0, 0, 1, (EdgeTerm("skip", 1),)),))),
    ("edge 0: mixing weight -1 of 1", (1, 1, 1, (Edge(0, 0, 1, (EdgeTerm("skip", -1),)),))),
    ("edge 0: sep_conv of (size, dilation) (4, 1); allowed",
     (1, 1, 1, (Edge(0, 0, 1, (EdgeTerm("sep_conv", 0, 4),)),))),
    ("edge 0: dil_conv of (size, dilation) (7, 2); allowed",
     (1, 1, 1, (Edge(0, 0, 1, (EdgeTerm("dil_conv", 0, 7, 2),)),))),
    ("edge 0: dil_conv of (size, dilation) (0, 1); allowed",
     (1, 1, 1, (Edge(0, 0, 1, (EdgeTerm("dil_conv", 0),)),))),
    ("edge 0: sep_conv of (size, dilation) (3, 2); allowed: ((3, 1), (5, 1), (7, 1))",
     (1, 1, 1, (Edge(0, 0, 1, (EdgeTerm("sep_conv", 0, 3, 2),)),))),
    ("edge 0: its terms share mixing weights, [0, 0]", (1, 1, 1, (Edge(0, 0, 1, (SKIP, POOL)),))),
    ("edges enter the nodes [1, 0]; they are listed node by node",
     (1, 2, 1, (Edge(0, 1, 1, (SKIP,)), Edge(0, 0, 1, (SKIP,))))),
    ("edge 0: skip at stride 2", (1, 1, 1, (Edge(0, 0, 2, (SKIP,)),))),
    ("edge 0: reduce_skip at stride 1",
     (1, 1, 1, (Edge(0, 0, 1, (EdgeTerm("reduce_skip", 0),)),))),
]  # fmt: skip


@pytest.mark.parametrize(("message", "given"), TABLES, ids=[case[0] for case in TABLES])
def test_bad_tables(message: str, given: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        EdgeTable(*given)


def test_a_table_survives_its_code() -> None:
    for table in (
        TABLE,
        STRIDED,
        one_edge(1),
        one_edge(2),
        EdgeTable(1, 1, 1, (Edge(0, 0, 1, ()),)),
    ):
        assert EdgeTable.decode(table.code) == table
        assert hash(EdgeTable.decode(table.code)) == hash(table)


def test_what_a_table_counts() -> None:
    normal, reduction = one_edge(1), one_edge(2)
    assert (normal.params, normal.norms, normal.halves) == (3 * 4 + 2 * 2, 2 + 3 * 2 + 2, 3 * 2 + 2)
    assert (reduction.params, reduction.norms, reduction.halves) == (18, 11, 8)
    assert (normal.separable, normal.kept, normal.skips) == (3, 3, 1)
    assert (reduction.separable, reduction.kept, reduction.skips) == (3, 3, 1)
    assert len(reduction.param_shapes(6)) == reduction.params
    assert reduction.param_shapes(6)[:2] == [(3, 6, 1, 1)] * 2
    assert normal.param_shapes(6)[:4] == [(6, 1, 3, 3), (6, 6, 1, 1)] * 2
