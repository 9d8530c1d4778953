"""mixed_edges on the CPU: values, gradients, running statistics, sizes, layouts, special values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from cases import bits, laid_out, noise_of
from edge_cases import (
    EPS,
    MEMORY,
    MOMENTUM,
    TERMS,
    Inputs,
    by_eager,
    call,
    cell,
    check,
    edge,
    make,
    one_edge,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from targets import Target

import fastnas
from fastnas import reference
from fastnas.reference import Edge, EdgeTable, EdgeTerm
from fastnas.reference.primitives import search_candidate

OP = "mixed_edges"
pytestmark = pytest.mark.backends("eager", "cpu")

STRIDES = pytest.mark.parametrize("stride", [1, 2])
PRIMITIVES = {
    "max_pool": "max_pool_3x3", "avg_pool": "avg_pool_3x3", "skip": "skip_connect",
    "sep_3": "sep_conv_3x3", "sep_5": "sep_conv_5x5", "sep_7": "sep_conv_7x7",
    "dil_3": "dil_conv_3x3", "dil_5": "dil_conv_5x5",
}  # fmt: skip
# Every kind of kernel and no more, for what multiplies the cases.
FEW = ("max_pool", "avg_pool", "skip", "sep_3", "dil_5")


@STRIDES
@pytest.mark.parametrize("name", TERMS)
def test_every_term_alone(backend: Target, dtype: torch.dtype, name: str, stride: int) -> None:
    check(make(one_edge(stride, name), dtype=dtype), backend.name)


@STRIDES
@pytest.mark.parametrize("name", TERMS)
def test_a_term_is_the_layer_of_darts(backend: Target, name: str, stride: int) -> None:
    """The modules of the public code, with torch's batch norms and their running statistics."""
    layer = search_candidate(PRIMITIVES[name], 6, stride).double()
    norms = [m for m in layer.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = MOMENTUM
    params = list(layer.parameters())
    running = [(torch.zeros(6).double(), torch.ones(6).double()) for _ in norms]
    for training in (True, False):
        layer.train(training)
        x = make(one_edge(stride, name), dtype=torch.float64, seed=int(training)).x[0]
        with torch.no_grad():
            y = fastnas.mixed_edges(
                [x], torch.ones(1, 1), params, one_edge(stride, name), running=running,
                momentum=MOMENTUM, training=training, eps=EPS, backend=backend.name,
            )  # fmt: skip
            torch.testing.assert_close(y, layer(x), rtol=1e-10, atol=1e-10)
        for (mean, var), norm in zip(running, norms):
            torch.testing.assert_close(mean, norm.running_mean, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(var, norm.running_var, rtol=1e-10, atol=1e-10)


@STRIDES
def test_a_whole_cell(backend: Target, dtype: torch.dtype, stride: int) -> None:
    check(make(cell(stride), (6, 5), C=4, N=2, dtype=dtype), backend.name)


@pytest.mark.backends("cpu")
@STRIDES
@pytest.mark.parametrize("C", [1, 2, 3, 4, 5, 16, 17, 20, 33, 64])
def test_every_number_of_channels(backend: Target, dtype: torch.dtype, C: int, stride: int) -> None:
    names = [name for name in TERMS if stride == 1 or C % 2 == 0 or name != "skip"]
    check(make(one_edge(stride, *names), (4, 5), C, N=3, dtype=dtype), backend.name)


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


@pytest.mark.parametrize("distance", [1.0, 0.1, 0.01])
def test_channels_that_nearly_cancel(backend: Target, dtype: torch.dtype, distance: float) -> None:
    """Two channels are alike and a row of the pointwise kernel subtracts them: var(W u) is small
    beside |W|^2 var(u)."""
    inputs = make(one_edge(1, "dil_3"), (8, 8), C=2, N=8, dtype=dtype)
    x, (depthwise, pointwise) = inputs.x[0], inputs.params
    x = torch.stack([x[:, 0], x[:, 0] + distance * x[:, 1]], 1)
    depthwise = depthwise[:1].repeat(2, 1, 1, 1)
    pointwise = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=dtype).view_as(pointwise)
    given = replace(inputs, x=[x], params=[depthwise, pointwise])
    condition = 4 / distance**2
    if dtype != torch.float32 or condition < 10:
        check(given, backend.name)
        return
    # The variance comes from cov(u), which loses what cancels: eps times the condition is left.
    exact = run(replace(given, x=[x.double()], params=[depthwise.double(), pointwise.double()],
                        w=given.w.double(), dy=given.dy.double()), "eager")["y"]  # fmt: skip
    error = (run(given, backend.name)["y"].double() - exact).abs().max() / exact.abs().max()
    assert error < 8 * condition * torch.finfo(dtype).eps


def test_images_that_differ_more_than_their_pixels(backend: Target, dtype: torch.dtype) -> None:
    """As sums of squares about one common shift would lose it: each image has its own mean."""
    inputs = make(one_edge(1), (4, 4), C=3, N=20, dtype=dtype)
    steps = torch.arange(20, dtype=dtype).view(-1, 1, 1, 1) % 7 * 512
    check(replace(inputs, x=[inputs.x[0] + steps]), backend.name)


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
    table = TABLES[name]
    sizes = [(7, 5), (4, 3)] if name == "an input only at stride 2" else []
    inputs = make(table, (5, 4), C=4, sizes=sizes)
    got = run(inputs, backend.name)
    for key, want in by_terms(inputs).items():
        torch.testing.assert_close(got[key], want, rtol=1e-10, atol=1e-10, msg=key)
    for memory in MEMORY:
        check(inputs, backend.name, memory=memory)


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
    inputs = make(cell(1, 2, FEW))
    x = inputs.x[0].clone().requires_grad_()
    apart = run(replace(inputs, x=[x.detach(), x.detach()]), backend.name)
    call(replace(inputs, x=[x, x]), backend.name).backward(inputs.dy)
    torch.testing.assert_close(x.grad, apart["dx[0]"] + apart["dx[1]"], rtol=1e-10, atol=1e-10)


LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "misaligned")


@pytest.mark.parametrize("dy_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_change_a_bit(backend: Target, layout: str, dy_layout: str) -> None:
    table = cell(1, 1, FEW)
    want = run(make(table, dtype=torch.float32), "cpu")
    given = make(table, dtype=torch.float32, layouts=[layout, "channels_last"],
                 dy_layout=dy_layout)  # fmt: skip
    got = run(given, backend.name)
    if backend.name == "cpu":
        same_bits(got, want)
    else:
        for name, t in got.items():
            torch.testing.assert_close(t, want[name], rtol=1e-3, atol=1e-3)


def test_layouts_of_w_and_params(backend: Target) -> None:
    inputs = make(cell(2, 2, FEW), dtype=torch.float32)
    other = replace(
        inputs,
        w=laid_out(inputs.w, "transposed"),
        params=[laid_out(p, layout) for p, layout in zip(inputs.params, LAYOUTS * 99)],
    )
    same_bits(run(other, backend.name), run(inputs, backend.name))


def test_expanded_tensors(backend: Target, dtype: torch.dtype) -> None:
    inputs = make(cell(1, 1, FEW), dtype=dtype, layouts=["expanded"], dy_layout="expanded")
    check(inputs, backend.name)


def same_bits(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, t in got.items():
        assert torch.equal(bits(t), bits(want[name])), name


@pytest.mark.parametrize("w_dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_w_of_another_dtype(backend: Target, dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    got = check(make(one_edge(1), dtype=dtype, w_dtype=w_dtype), backend.name)
    assert got["dw"].dtype == w_dtype


@pytest.mark.parametrize("weights", ["zero", "one-hot"])
def test_plain_weights(backend: Target, dtype: torch.dtype, weights: str) -> None:
    inputs = make(cell(2, 2, FEW), dtype=dtype)
    w = torch.zeros_like(inputs.w)
    if weights == "one-hot":
        w[:, 3] = 1
    check(replace(inputs, w=w), backend.name)


@pytest.mark.parametrize("noise", [None, noise_of("gaussian_additive")])
@STRIDES
def test_memory_does_not_change_the_result(
    backend: Target, dtype: torch.dtype, stride: int, noise: fastnas.SkipNoise | None
) -> None:
    inputs = make(cell(stride, 2), C=4, N=8, dtype=dtype, noise=noise)
    fast, lean, minimal = (run(inputs, backend.name, memory=memory) for memory in MEMORY)
    same_bits(lean, minimal)
    if dtype == torch.bfloat16 and backend.name == "cpu":
        check(inputs, backend.name, memory="fast")  # what it keeps is rounded
    else:
        same_bits(fast, lean)


@STRIDES
def test_outside_of_training(backend: Target, dtype: torch.dtype, stride: int) -> None:
    inputs = make(cell(stride, 2), (5, 4), C=4, dtype=dtype, noise=noise_of("uniform_additive"))
    generator = torch.Generator().manual_seed(5)
    stats = torch.rand(inputs.table.norms, 2, 4, generator=generator, dtype=torch.float64)
    stats = (stats + 0.1).to(torch.promote_types(dtype, torch.float32))
    running = [(mean.clone(), var.clone()) for mean, var in stats]
    with torch.no_grad():
        got = call(replace(inputs, level=None, rng=None), backend.name, "fast", running, False)

    def want(dtype: torch.dtype) -> torch.Tensor:
        x, params = ([t.to(dtype) for t in ts] for ts in (inputs.x, inputs.params))
        return reference.mixed_edges(x, inputs.w.to(dtype), params, inputs.table,
                                     stats.to(dtype) if dtype == torch.float64 else stats,
                                     training=False, eps=EPS)  # fmt: skip

    exact, eager = want(torch.float64), want(dtype)
    eps = 1e-10 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    assert (got - exact).norm() <= 2 * (eager - exact).norm() + eps * exact.norm()
    assert torch.equal(torch.stack([t for pair in running for t in pair]), stats.flatten(0, 1))


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (0, 4, 3, 3)], ids=str)
def test_few_values_outside_of_training(backend: Target, shape: tuple[int, ...]) -> None:
    N, C, *size = shape
    inputs = make(cell(1, 2), (size[0], size[1]), C, N)
    with torch.no_grad():
        y = call(inputs, backend.name, "fast", inputs.initial_running(), False)
    assert y.shape == (N, 2 * C, *size)
    assert y.isfinite().all()


@STRIDES
def test_gradients_at_ties_go_where_torch_sends_them(
    backend: Target, dtype: torch.dtype, stride: int
) -> None:
    """Integers in 0..2: nearly every window has ties. dy so that the sums are exact."""
    inputs = make(one_edge(stride, "max_pool"), (9, 8), C=5, N=4, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(3, inputs.x[0].shape, generator=generator).to(dtype)
    tied = replace(inputs, x=[x], w=torch.ones_like(inputs.w))
    check(tied, backend.name)
    got = run(tied, backend.name)["dx[0]"]
    leaf = x.clone().requires_grad_()
    z = torch.nn.functional.max_pool2d(leaf, 3, stride, 1)
    torch.nn.functional.batch_norm(z, None, None, training=True).backward(inputs.dy)
    assert leaf.grad is not None
    assert torch.equal(got == 0, leaf.grad == 0)


SPECIAL = [torch.inf, -torch.inf, torch.nan]


@pytest.mark.backends("cpu")
@STRIDES
@pytest.mark.parametrize("where", ["x", "w", "params", "dy"])
@pytest.mark.parametrize("name", TERMS)
def test_inf_and_nan_spread_as_in_eager(
    backend: Target, name: str, where: str, stride: int
) -> None:
    """Finite, and the same, where eager is finite. A NaN gives NaN where it does in eager; of an
    inf, eager's order of summation makes inf or NaN."""
    inputs = make(one_edge(stride, name), (5, 6), C=4, N=4)
    if where == "params" and not inputs.params:
        return
    for special in SPECIAL:
        x, w, dy = (t.clone() for t in (inputs.x[0], inputs.w, inputs.dy))
        params = [p.clone() for p in inputs.params]
        t = {"x": x, "w": w, "dy": dy}.get(where, params[-1] if params else x)
        t[(t.shape[0] - 1, 0, 0, 0)[: t.dim()]] = special
        spoiled = replace(inputs, x=[x], w=w, params=params, dy=dy)
        eager = by_eager(spoiled)
        for key, found in run(spoiled, backend.name).items():
            want, what = eager[key], f"{key}, {special}"
            finite = want.isfinite()
            assert torch.equal(found.isfinite(), finite), what
            torch.testing.assert_close(found[finite], want[finite], rtol=1e-9, atol=1e-9, msg=what)
            assert special == special or torch.equal(found.isnan(), want.isnan()), what


@STRIDES
def test_nan_in_a_max_pool_takes_the_gradient(backend: Target, stride: int) -> None:
    """As torch: the last NaN of a window. The gradient itself is NaN by the batch norm."""
    inputs = make(one_edge(stride, "max_pool"), (5, 6), C=4, N=4)
    x = inputs.x[0].clone()
    x[1, 2, 1, 1] = x[1, 2, 1, 2] = x[1, 2, 2, 1] = torch.nan
    inputs = replace(inputs, x=[x])
    got, want = run(inputs, backend.name), by_eager(inputs)
    for name in ("y", "dx[0]"):
        assert torch.equal(got[name].isnan(), want[name].isnan()), name


@pytest.mark.backends("cpu")
def test_a_constant_channel(backend: Target, dtype: torch.dtype) -> None:
    """There is nothing to normalise; where eager rounds, it gives that times eps^-1/2."""
    inputs = make(one_edge(1, "avg_pool", "max_pool"), (6, 6), C=3, N=4, dtype=dtype)
    x = inputs.x[0].clone()
    x[:, 1] = 3.0
    got = run(replace(inputs, x=[x]), backend.name)
    assert not got["y"][:, 1].any()
    assert got["dx[0]"].isfinite().all()


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("memory", MEMORY)
def test_threads_do_not_change_a_bit(backend: Target, dtype: torch.dtype, memory: str) -> None:
    inputs = make(cell(2, 2), (9, 7), C=18, N=20, dtype=dtype,
                  noise=noise_of("gaussian_additive"))  # fmt: skip
    outcomes = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        outcomes.append(run(inputs, "cpu", memory=memory))
    for other in outcomes[1:]:
        same_bits(other, outcomes[0])


@pytest.mark.parametrize("form", [None, "gaussian_additive"])
def test_same_bits_every_time(backend: Target, dtype: torch.dtype, form: str | None) -> None:
    noise = None if form is None else noise_of(form)
    inputs = make(cell(1, 2, FEW), C=5, N=17, dtype=dtype, noise=noise)
    same_bits(run(inputs, backend.name), run(inputs, backend.name))


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def use_isa(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    native = pytest.importorskip("fastnas._C")
    if request.param not in native.supported_isas():
        pytest.skip(f"this CPU has no {request.param}")
    before = native.isa()
    yield lambda: native.use_isa(request.param)
    native.use_isa(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_vector_width(use_isa: Callable[[], None], dtype: torch.dtype) -> None:
    for C, stride in ((3, 1), (10, 2), (18, 1), (18, 2)):
        names = [name for name in TERMS if C % 2 == 0 or stride == 1 or name != "skip"]
        noise = noise_of("gaussian_additive")
        inputs = make(cell(stride, 1, names), (7, 6), C, dtype=dtype, noise=noise)
        before = run(inputs, "cpu")
        use_isa()
        got = check(inputs, "cpu")
        if dtype == torch.float64:
            for name, t in got.items():
                torch.testing.assert_close(t, before[name], rtol=1e-10, atol=1e-10)


def test_inputs_are_not_written(backend: Target) -> None:
    inputs = make(cell(1, 2, FEW), layouts=["contiguous", "channels_last"],
                  noise=noise_of("gaussian_additive"))  # fmt: skip
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
