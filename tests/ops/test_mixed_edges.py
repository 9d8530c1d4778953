"""mixed_edges on every backend: values, gradients, running statistics, sizes, layouts, weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import laid_out, noise_of
from edge_cases import (
    EPS,
    FEW,
    MEMORY,
    MOMENTUM,
    TERMS,
    Inputs,
    agree,
    by_eager,
    call,
    cell,
    check,
    compare,
    edge,
    make,
    named,
    one_edge,
    outside_of_training,
    run,
    same_bits,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from targets import Target

import fastnas
from fastnas import reference
from fastnas.layers.primitives import search_candidate
from fastnas.spaces import Edge, EdgeTable, EdgeTerm

OP = "mixed_edges"
pytestmark = pytest.mark.backends("eager", "cpu", "cuda-host", "cuda")

STRIDES = pytest.mark.parametrize("stride", [1, 2])
PRIMITIVES = {
    "max_pool": "max_pool_3x3", "avg_pool": "avg_pool_3x3", "skip": "skip_connect",
    "sep_3": "sep_conv_3x3", "sep_5": "sep_conv_5x5", "sep_7": "sep_conv_7x7",
    "dil_3": "dil_conv_3x3", "dil_5": "dil_conv_5x5",
}  # fmt: skip


@STRIDES
@pytest.mark.parametrize("name", TERMS)
def test_every_term_alone(backend: Target, dtype: torch.dtype, name: str, stride: int) -> None:
    # dw is one number here: of other seeds eager's is the exact one by luck, or a relu turns.
    check(make(one_edge(stride, name), dtype=dtype, target=backend, seed=1), backend.name)


@STRIDES
@pytest.mark.parametrize("name", TERMS)
def test_a_term_is_the_layer_of_darts(backend: Target, name: str, stride: int) -> None:
    """The modules of the public code, with torch's batch norms and their running statistics."""
    table, dtype = one_edge(stride, name), backend.widest(OP)
    layers = {t: search_candidate(PRIMITIVES[name], 6, stride) for t in (torch.float64, dtype)}
    norms, params = {}, {}
    for wide, layer in layers.items():
        layer.load_state_dict(layers[dtype].state_dict())
        layer.to(wide)
        norms[wide] = [m for m in layer.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        params[wide] = list(layer.parameters())
        for norm in norms[wide]:
            norm.momentum = MOMENTUM
    C, device = 6, backend.device
    running = [
        (torch.zeros(C, dtype=dtype, device=device), torch.ones(C, dtype=dtype, device=device))
        for _ in norms[dtype]
    ]

    def by_layer(wide: torch.dtype) -> dict[str, torch.Tensor]:
        pairs = [(norm.running_mean, norm.running_var) for norm in norms[wide]]
        return {"y": layers[wide](x.cpu().to(wide))} | named(pairs)

    for training in (True, False):
        for layer in layers.values():
            layer.train(training)
        x = make(table, dtype=dtype, seed=int(training), target=backend).x[0]
        with torch.no_grad():
            y = fastnas.mixed_edges(
                [x], torch.ones(1, 1, device=device), [p.to(device) for p in params[dtype]], table,
                running=running, momentum=MOMENTUM, training=training, eps=EPS,
                backend=backend.name,
            )  # fmt: skip
            want = {wide: by_layer(wide) for wide in layers}  # once: it updates the statistics
            agree({"y": y} | named(running), want[torch.float64], want[dtype], dtype)


@STRIDES
def test_a_whole_cell(backend: Target, dtype: torch.dtype, stride: int) -> None:
    check(make(cell(stride), (6, 5), C=4, N=2, dtype=dtype, target=backend), backend.name)


@pytest.mark.backends("cpu")
@STRIDES
@pytest.mark.parametrize("C", [1, 2, 3, 4, 5, 8, 12, 16, 17, 20, 33, 64])
def test_every_number_of_channels(backend: Target, dtype: torch.dtype, C: int, stride: int) -> None:
    """Of few channels several images share a vector; 7 leave some of its lanes empty."""
    names = [name for name in TERMS if stride == 1 or C % 2 == 0 or name != "skip"]
    check(make(one_edge(stride, *names), (3, 5), C, N=7, dtype=dtype), backend.name)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("N", [1, 2, 3, 15, 16, 17, 20, 33])
def test_every_number_of_images(backend: Target, dtype: torch.dtype, N: int) -> None:
    """They are worked on in at most 16 groups."""
    check(make(cell(2, 2, FEW), (9, 8), C=4, N=N, dtype=dtype), backend.name)


@pytest.mark.backends("cpu")
@STRIDES
@pytest.mark.parametrize(
    "size",
    [(7, 9), (5, 5), (1, 3), (3, 1), (2, 2), (1, 1), (2, 9), (8, 8), (13, 2), (1, 40), (70, 33)],
    ids=str,
)
def test_every_size(
    backend: Target, dtype: torch.dtype, size: tuple[int, int], stride: int
) -> None:
    N = 16 if size[0] * size[1] < 50 else 1
    check(make(one_edge(stride), size, C=2, N=N, dtype=dtype), backend.name)


@pytest.mark.backends("cpu")
@STRIDES
@pytest.mark.parametrize("offset", [100.0, -100.0])
def test_inputs_far_from_zero(
    backend: Target, dtype: torch.dtype, offset: float, stride: int
) -> None:
    """The mean is 100 standard deviations away."""
    for name in TERMS:
        check(make(one_edge(stride, name), (9, 8), N=4, dtype=dtype, offset=offset), backend.name)


TWO = ("skip", "sep_3")
TABLES = {
    "the same op twice": EdgeTable(1, 1, 6, (edge(0, 0, 2, FEW[:3] * 2),)),
    "an edge without a term": EdgeTable(2, 2, 2, (
        edge(0, 0, 1, TWO), Edge(1, 0, 1, ()), Edge(2, 1, 1, ()), edge(0, 1, 1, TWO))),
    "a node without a term": EdgeTable(1, 2, 2, (
        Edge(0, 0, 1, ()), edge(0, 1, 1, TWO), edge(1, 1, 1, ("skip",)))),
    "nothing at all": EdgeTable(1, 1, 1, (Edge(0, 0, 1, ()),)),
    "an input only at stride 2": EdgeTable(2, 2, 8, (
        edge(0, 0, 2), edge(1, 0), edge(2, 1), edge(0, 1, 2))),
    "an input that nothing leaves": EdgeTable(2, 1, 2, (edge(0, 0, 1, TWO),)),
    "a chain": EdgeTable(1, 3, 2, (edge(0, 0, 2, TWO), edge(1, 1, 1, TWO), edge(2, 2, 1, TWO))),
    "two edges from a state to a node": EdgeTable(1, 1, 2, (
        edge(0, 0, 1, TWO), edge(0, 0, 1, TWO[::-1]))),
    "two equal edges": EdgeTable(1, 1, 2, (edge(0, 0, 1, TWO), edge(0, 0, 1, TWO))),
    "convolutions of any size and dilation": EdgeTable(1, 1, 7, (Edge(0, 0, 2, (
        EdgeTerm("dil_conv", 0, 3, 1), EdgeTerm("dil_conv", 1, 5, 1), EdgeTerm("dil_conv", 2, 7, 1),
    )),)),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_unusual_tables(backend: Target, name: str) -> None:
    inputs = of_table(name, target=backend)
    for memory in MEMORY:
        check(inputs, backend.name, memory=memory)


@pytest.mark.backends("eager", "cpu")
@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_the_sum_of_its_terms(backend: Target, name: str) -> None:
    """In float64, which the reference of `check` is not compared with elsewhere."""
    inputs = of_table(name)
    got = run(inputs, backend.name)
    for key, want in by_terms(inputs).items():
        torch.testing.assert_close(got[key], want, rtol=1e-10, atol=1e-10, msg=key)


def of_table(name: str, target: Target | None = None) -> Inputs:
    sizes = [(7, 5), (4, 3)] if name == "an input only at stride 2" else []
    return make(TABLES[name], (5, 4), C=4, sizes=sizes, target=target)


def by_terms(inputs: Inputs) -> dict[str, torch.Tensor]:
    """y and dw term by term, each its own call of the reference with a table of its own."""
    w = inputs.w.clone().requires_grad_()
    states = dict(enumerate(inputs.x))
    params = iter(inputs.params)
    owned = [[(t, [next(params) for _ in range(t.params)]) for t in e.terms]
             for e in inputs.table.edges]  # fmt: skip
    nodes = []
    for node in range(inputs.table.nodes):
        y = torch.zeros_like(inputs.dy[:, : inputs.x[0].shape[1]])
        for row, (e, terms) in enumerate(zip(inputs.table.edges, owned)):
            for t, own in terms if e.target == node else []:
                alone = EdgeTable(1, 1, 1, (Edge(0, 0, e.stride, (t._replace(weight=0),)),))
                stats = torch.zeros(t.norms, 2, y.shape[1], dtype=y.dtype)
                y = y + w[row, t.weight] * reference.mixed_edges(
                    [states[e.source]], torch.ones(1, 1), own, alone, stats, eps=EPS
                )
        states[inputs.table.inputs + node] = y
        nodes.append(y)
    y = torch.cat(nodes, 1)
    if y.requires_grad:
        y.backward(inputs.dy)
    return {"y": y.detach(), "dw": torch.zeros_like(w) if w.grad is None else w.grad}


def test_one_tensor_given_twice(backend: Target) -> None:
    inputs = make(cell(1, 2, FEW), target=backend)
    x = inputs.x[0].clone().requires_grad_()
    twice = replace(inputs, x=[x.detach(), x.detach()])
    call(replace(inputs, x=[x, x]), backend.name).backward(inputs.dy)
    assert x.grad is not None
    exact, eager = (
        {"dx": results["dx[0]"] + results["dx[1]"]}
        for results in (by_eager(twice, torch.float64), by_eager(twice))
    )
    agree({"dx": x.grad}, exact, eager, x.dtype)


LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "misaligned")


@pytest.mark.parametrize(
    ("layout", "dy_layout"),
    [*zip(LAYOUTS, LAYOUTS[1:] + LAYOUTS[:1]), *((layout, layout) for layout in LAYOUTS)],
)
def test_layouts_do_not_change_a_bit(backend: Target, layout: str, dy_layout: str) -> None:
    table = cell(1, 1, FEW)
    given = make(table, dtype=torch.float32, layouts=[layout, "channels_last"],
                 dy_layout=dy_layout, target=backend)  # fmt: skip
    got = check(given, backend.name)
    if backend.name != "eager":
        same_bits(got, run(make(table, dtype=torch.float32, target=backend), backend.name))


def test_layouts_of_w_and_params(backend: Target) -> None:
    inputs = make(cell(2, 2, FEW), dtype=torch.float32, target=backend)
    other = replace(
        inputs,
        w=laid_out(inputs.w, "transposed"),
        params=[laid_out(p, layout) for p, layout in zip(inputs.params, LAYOUTS * 99)],
    )
    same_bits(run(other, backend.name), run(inputs, backend.name))


def test_expanded_tensors(backend: Target, dtype: torch.dtype) -> None:
    inputs = make(cell(1, 1, FEW), dtype=dtype, layouts=["expanded"], dy_layout="expanded",
                  target=backend)  # fmt: skip
    check(inputs, backend.name)


@pytest.mark.parametrize("w_dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_w_of_another_dtype(backend: Target, dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    got = check(make(one_edge(1), dtype=dtype, w_dtype=w_dtype, target=backend), backend.name)
    assert got["dw"].dtype == w_dtype


@pytest.mark.parametrize("weights", ["zero", "one-hot"])
def test_plain_weights(backend: Target, dtype: torch.dtype, weights: str) -> None:
    # Of this seed no relu's argument comes so close to 0 that bfloat16 or TF32 turns its sign.
    inputs = make(cell(2, 2, FEW), dtype=dtype, target=backend, seed=6)
    w = torch.zeros_like(inputs.w)
    if weights == "one-hot":
        w[:, 3] = 1
    check(replace(inputs, w=w), backend.name)


@pytest.mark.parametrize(("stride", "noise"), [(1, noise_of("gaussian_additive")), (2, None)])
def test_memory_does_not_change_the_result(
    backend: Target, dtype: torch.dtype, stride: int, noise: fastnas.SkipNoise | None
) -> None:
    names = ("max_pool", "skip", "sep_3", "sep_5", "dil_5")
    inputs = make(cell(stride, 2, names), (4, 5), 4, 4, dtype, noise=noise, target=backend)
    fast, lean, minimal = (run(inputs, backend.name, memory=memory) for memory in MEMORY)
    same_bits(lean, minimal)
    compare(lean, inputs)
    if torch.finfo(dtype).bits == 16 and backend.name != "eager":
        compare(fast, inputs)  # what it keeps is rounded
    else:
        same_bits(fast, lean)


@STRIDES
def test_outside_of_training(backend: Target, dtype: torch.dtype, stride: int) -> None:
    inputs = make(cell(stride, 2), (5, 4), C=4, dtype=dtype, noise=noise_of("uniform_additive"),
                  target=backend)  # fmt: skip
    check(outside_of_training(inputs), backend.name, memory="fast")


@STRIDES
@pytest.mark.parametrize("name", TERMS)
def test_every_term_alone_outside_of_training(
    backend: Target, dtype: torch.dtype, name: str, stride: int
) -> None:
    inputs = make(one_edge(stride, name), dtype=dtype, target=backend, seed=1)
    check(outside_of_training(inputs), backend.name)


@pytest.mark.parametrize("name", TABLES)
def test_unusual_tables_outside_of_training(backend: Target, name: str) -> None:
    check(outside_of_training(of_table(name, target=backend)), backend.name)


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (0, 4, 3, 3)], ids=str)
def test_few_values_outside_of_training(backend: Target, shape: tuple[int, ...]) -> None:
    N, C, *size = shape
    inputs = make(cell(1, 2), (size[0], size[1]), C, N, target=backend)
    running = torch.stack([torch.stack(pair) for pair in inputs.initial_running()])
    got = run(replace(inputs, statistics=running), backend.name)
    assert got["y"].shape == (N, 2 * C, *size)
    assert all(t.isfinite().all() for t in got.values())


@pytest.mark.backends("eager", "cpu", "cuda")  # on the shim also in any order of threads
@pytest.mark.parametrize("form", [None, "gaussian_additive"])
def test_same_bits_every_time(backend: Target, dtype: torch.dtype, form: str | None) -> None:
    noise = None if form is None else noise_of(form)
    inputs = make(cell(1, 2, FEW), C=5, N=17, dtype=dtype, noise=noise, target=backend)
    same_bits(run(inputs, backend.name), run(inputs, backend.name))


def test_inputs_are_not_written(backend: Target) -> None:
    inputs = make(cell(1, 2, FEW), layouts=["contiguous", "channels_last"],
                  noise=noise_of("gaussian_additive"), target=backend)  # fmt: skip
    assert inputs.level is not None and inputs.rng is not None
    tensors = (*inputs.leaves.values(), inputs.dy, inputs.level, inputs.rng)
    before = [t.clone() for t in tensors]
    run(inputs, backend.name)
    assert all(torch.equal(t, saved) for t, saved in zip(tensors, before))


@st.composite
def calls(draw: st.DrawFn) -> Inputs:
    inputs, nodes, C = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    stride = draw(st.integers(1, 2))
    allowed = [name for name in TERMS if stride == 1 or C % 2 == 0 or name != "skip"]
    edges = [
        edge(source, node, stride if source < inputs else 1, names)
        for node in range(nodes)
        for source in range(inputs + node)
        if (names := draw(st.lists(st.sampled_from(allowed), max_size=3))) or source == 0
    ]
    size = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    return make(
        EdgeTable(inputs, nodes, 3, tuple(edges)),
        size,
        C,
        # Few values of a channel have |v| = 1 whatever they are: dx is nothing but rounding.
        max(draw(st.integers(1, 18)), 24 // (size[0] * size[1])),
        layouts=draw(st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=2)),
        dy_layout=draw(st.sampled_from(LAYOUTS)),
        noise=noise_of("gaussian_multiplicative") if draw(st.booleans()) else None,
        seed=draw(st.integers(0, 2**20)),
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(inputs=calls(), memory=st.sampled_from(MEMORY), data=st.data())
def test_drawn_cells(inputs: Inputs, memory: str, data: st.DataObject) -> None:
    needs = data.draw(st.sets(st.sampled_from(sorted(inputs.leaves))))
    check(inputs, "cpu", needs, memory)
    check(outside_of_training(inputs), "cpu", needs, memory)
