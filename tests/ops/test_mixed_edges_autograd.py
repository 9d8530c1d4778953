"""mixed_edges and autograd: which gradients, what is held, opcheck, gradcheck, compile."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import bits, laid_out, noise_of
from edge_cases import (
    EPS,
    MEMORY,
    Inputs,
    call,
    cell,
    check,
    edge,
    make,
    one_edge,
    outside_of_training,
    run,
)
from op_check import EVERY, SCHEMA, opcheck
from targets import Target

import fastnas
from fastnas.backends import SavedTensors
from fastnas.backends.calls import EdgesCall, Noise
from fastnas.ops.mixed_edges import MIXED_EDGES
from fastnas.spaces import EdgeTable

OP = "mixed_edges"
pytestmark = pytest.mark.backends("eager", "cpu", "cuda-host", "cuda")

NAMES = ("max_pool", "skip", "sep_3", "dil_5")
SMALL = EdgeTable(1, 2, 4, (edge(0, 0, 1, NAMES), edge(1, 1, 1, ("skip", "dil_3"))))


def small(
    target: Target, form: str | None = None, dtype: torch.dtype | None = None, stride: int = 1
) -> Inputs:
    noise = None if form is None else noise_of(form)
    return make(cell(stride, 2, NAMES), (4, 5), C=2, dtype=dtype, noise=noise, target=target)


def live(inputs: Inputs, backend: str, memory: str = "lean") -> torch.Tensor:
    """A call on the tensors themselves, all of which want gradients."""
    for t in inputs.leaves.values():
        t.requires_grad_()
    return call(inputs, backend, memory)


@pytest.mark.parametrize(("form", "stride"), [(None, 1), ("uniform_multiplicative", 2)])
@pytest.mark.parametrize("memory", MEMORY)
def test_every_subset_of_gradients(
    backend: Target, form: str | None, memory: str, stride: int
) -> None:
    inputs = small(backend, form, stride=stride)
    params = {name for name in inputs.leaves if name.startswith("params")}
    for wanted in itertools.product([set(), {"w"}], [set(), {"x[0]"}], [{"x[1]"}], [set(), params]):
        needs = set().union(*wanted)
        got = check(inputs, backend.name, needs, memory)
        assert {name[1:] for name in got if name.startswith("d")} == needs
    for needs in (set(), {"w"}, params, {min(params)}):
        check(inputs, backend.name, needs, memory)


@pytest.mark.parametrize("stride", [1, 2])
def test_every_subset_of_gradients_outside_of_training(backend: Target, stride: int) -> None:
    inputs = outside_of_training(small(backend, stride=stride))
    params = {name for name in inputs.leaves if name.startswith("params")}
    for wanted in itertools.product([set(), {"w"}], [set(), {"x[0]"}], [set(), {"x[1]"}],
                                    [set(), params, {min(params)}]):  # fmt: skip
        check(inputs, backend.name, set().union(*wanted))


@pytest.mark.parametrize("memory", MEMORY)
def test_what_is_held_outside_of_training(backend: Target, memory: str) -> None:
    """Nothing but the states and the statistics."""
    inputs = outside_of_training(make(cell(2, 2), (9, 7), C=4, N=3, target=backend))
    inputs = inputs.rebuilt([t.requires_grad_() for t in inputs.leaves.values()])
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = call(inputs, backend.name, memory, inputs.initial_running())
    given = {t.data_ptr() for t in (y, *inputs.leaves.values())}
    others = [t.shape for t in saved if t.numel() and t.data_ptr() not in given]
    # Those that the call is given, and those that it leaves to backward.
    assert [tuple(shape) for shape in others] == 2 * [(inputs.table.norms, 2, 4)]


@pytest.mark.parametrize("dparams", [True, False])
@pytest.mark.parametrize("form", [None, "gaussian_additive", "gaussian_multiplicative"])
@pytest.mark.parametrize("memory", MEMORY)
def test_what_is_held(backend: Target, memory: str, form: str | None, dparams: bool) -> None:
    """Besides inputs and output what `SavedTensors` says, here counted by hand."""
    noise = None if form is None else noise_of(form)
    inputs = make(cell(2, 2), (9, 7), C=4, N=3, noise=noise, target=backend)
    for name, t in inputs.leaves.items():
        t.requires_grad_(dparams or not name.startswith("params"))
    saved: list[torch.Tensor] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call(inputs, backend.name, memory)
    given = {t.data_ptr() for t in (y, inputs.level, inputs.rng, *inputs.leaves.values())
             if t is not None}  # fmt: skip
    assert given <= {t.data_ptr() for t in saved}
    others = [t for t in saved if t.numel() and t.data_ptr() not in given]

    edges, strided = 5, 4
    halves = edges * (3 * 2 + 2)
    want = [(edges * (2 + 3 * 2 + 2) + strided, 2, 4), (halves, 4)]
    want += [(halves, 4, 4)] if dparams else []
    want += [(edges * 3, 3, 5, 4, 4)] if memory != "minimal" else []  # sep_conv
    want += [(edges * 3, 3, 5, 4, 4)] if memory == "fast" else []  # 5x5 and 7x7
    want += [(edges,)] if form == "gaussian_additive" else []
    assert Counter(tuple(t.shape) for t in others) == Counter(want)

    expected = SavedTensors.empty(
        inputs.x[0], inputs.table, (3, 4, 5, 4), form or "none", memory, dparams, True
    )
    assert sum(t.nbytes for t in expected) == sum(t.nbytes for t in others)


def test_no_graph_where_no_gradient_is_wanted(backend: Target) -> None:
    inputs = small(backend)
    assert call(inputs, backend.name).grad_fn is None
    with torch.no_grad():
        assert live(inputs, backend.name).grad_fn is None


@pytest.mark.parametrize("memory", MEMORY)
def test_backward_twice(backend: Target, memory: str) -> None:
    inputs = small(backend, "gaussian_additive", torch.float32)
    y = live(inputs, backend.name, memory)
    leaves = list(inputs.leaves.values())
    first = torch.autograd.grad(y, leaves, inputs.dy, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(y, leaves, inputs.dy)):
        assert torch.equal(bits(a), bits(b))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, leaves, inputs.dy)


@pytest.mark.parametrize("name", ["x[0]", "w", "params[0]", "y"])
def test_a_change_in_place_is_noticed(backend: Target, name: str) -> None:
    inputs = small(backend)
    y = live(inputs, backend.name)
    with torch.no_grad():
        ({"y": y} | inputs.leaves)[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(inputs.dy)


def test_gradients_accumulate(backend: Target) -> None:
    inputs = small(backend)
    once = run(inputs, backend.name)
    for _ in range(2):
        live(inputs, backend.name).backward(inputs.dy)
    for name, leaf in inputs.leaves.items():
        torch.testing.assert_close(leaf.grad, 2 * once[f"d{name}"])


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("form", [None, "uniform_additive", "gaussian_multiplicative"])
def test_gradcheck(backend: Target, form: str | None, stride: int) -> None:
    """Finite differences in fp64; not where std(x) is in the noise, a constant in backward."""
    noise = None if form is None else noise_of(form)
    table = SMALL if stride == 1 else one_edge(2, *NAMES)
    given = make(table, (3, 2), C=2, N=2, noise=noise)
    leaves = [t.requires_grad_() for t in given.leaves.values()]
    for inputs in (given, outside_of_training(given)):
        running = inputs.initial_running()
        assert torch.autograd.gradcheck(
            lambda *own: call(inputs.rebuilt(own), backend.name, running=running),  # noqa: B023
            leaves,
        )


@pytest.mark.parametrize(
    ("form", "memory", "layout"),
    [
        (None, "fast", "contiguous"),
        ("gaussian_additive", "lean", "contiguous"),
        (None, "minimal", "transposed"),
    ],
)
def test_opcheck(backend: Target, form: str | None, memory: str, layout: str) -> None:
    noise = None if form is None else noise_of(form)
    inputs = make(cell(2, 1, NAMES), (4, 5), C=2, dtype=torch.float32, noise=noise, target=backend)
    params = [laid_out(p, layout) for p in inputs.params]
    x, w = [laid_out(t, layout) for t in inputs.x], laid_out(inputs.w, layout)
    drawn = Noise([], form or "none", inputs.level, inputs.rng)
    running = outside_of_training(inputs).statistics if memory == "minimal" else None
    keep_gram = running is None
    call = EdgesCall(x, w, params, inputs.table, running, EPS, drawn, None, memory, keep_gram)
    # The fake gives the layout of the device, and "cuda-host" on the CPU that of a CUDA device.
    tests = SCHEMA if backend.name == "cuda-host" else EVERY
    needs = [
        [needs_w, *needs_x, *[needs_params] * len(params)]
        for needs_w, needs_x, needs_params in (
            (True, [True, True], True),
            (False, [False, True], True),
            (True, [True, False], False),
        )
    ]
    opcheck(MIXED_EDGES, call, inputs.dy, needs, backend.name, tests)


def step(inputs: Inputs, backend: str) -> Callable[..., torch.Tensor]:
    def f(
        x: list[torch.Tensor],
        alpha: torch.Tensor,
        params: list[torch.Tensor],
        running: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        return fastnas.mixed_edges(
            [t.sin() for t in x], alpha.softmax(1), params, inputs.table, running=running,
            noise=inputs.noise, rng=inputs.rng, memory="fast", backend=backend,
        ).square()  # fmt: skip

    return f


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("form", [None, "gaussian_additive"])
def test_compiles_to_a_full_graph(backend: Target, form: str | None) -> None:
    """The update of the running statistics included."""
    torch._dynamo.reset()
    inputs = small(backend, form, torch.float32)

    def results(f: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        running = inputs.initial_running()
        leaves = [t.detach().clone().requires_grad_() for t in inputs.leaves.values()]
        given = inputs.rebuilt(leaves)
        y = f(given.x, given.w, given.params, running)
        gradients = torch.autograd.grad(y, leaves, inputs.dy)
        return [y.detach(), *gradients, *(t for pair in running for t in pair)]

    f = step(inputs, backend.name)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for got, want in zip(results(compiled), results(f)):
        assert torch.equal(got, want)


@pytest.mark.backends("cpu")
def test_compiles_outside_of_training(backend: Target) -> None:
    torch._dynamo.reset()
    inputs = outside_of_training(small(backend, None, torch.float32))

    def f(*leaves: torch.Tensor) -> torch.Tensor:
        own = inputs.rebuilt([t.sin() for t in leaves])
        running = list(inputs.statistics.unbind()) if inputs.statistics is not None else []
        return fastnas.mixed_edges(
            own.x, own.w, own.params, own.table, running=[tuple(pair) for pair in running],
            training=False, backend=backend.name,
        ).square()  # fmt: skip

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    results = []
    for g in (compiled, f):
        leaves = [t.detach().clone().requires_grad_() for t in inputs.leaves.values()]
        y = g(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, inputs.dy)))
    for got, want in zip(*results):
        assert torch.equal(got, want)


def test_watched_by_a_dispatch_mode(backend: Target) -> None:
    """As by a profiler: the ops go through the dispatcher then."""
    from torch.utils.flop_counter import FlopCounterMode

    inputs = small(backend)
    with FlopCounterMode(display=False):
        got = run(inputs, backend.name)
    for name, t in run(inputs, backend.name).items():
        assert torch.equal(t, got[name]), name


@pytest.mark.backends("cpu")
def test_compiled_noise_without_a_stream_is_fresh_every_time(backend: Target) -> None:
    torch._dynamo.reset()
    inputs = replace(small(backend, "gaussian_additive", torch.float32), rng=None)
    f = torch.compile(step(inputs, backend.name), fullgraph=True, backend="aot_eager")

    def seeded(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        running = inputs.initial_running()
        return [f(inputs.x, inputs.w, inputs.params, running) for _ in range(2)]

    first, second = seeded(1)
    assert not torch.equal(first, second)
    assert torch.equal(first, seeded(1)[0])
